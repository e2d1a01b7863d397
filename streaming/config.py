"""Configuration of streaming: [streaming], [streaming.topics], [streaming.embedded], [streaming.job]."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.core.config import in_range, section
from streaming.topics import StreamingConfig, Topics

__all__ = ["EmbeddedLogConfig", "JobConfig", "StreamingConfig", "Topics"]


@section("streaming.embedded")
@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedLogConfig:
    """map_bytes_max: most bytes of one topic. buffer_*_max: what a producer holds before it writes by itself."""

    map_bytes_max: int = 1 << 36
    buffer_records_max: int = 65_536
    buffer_bytes_max: int = 32 << 20

    def __post_init__(self) -> None:
        in_range("streaming.embedded.map_bytes_max", self.map_bytes_max, 1 << 20, 1 << 44)
        in_range("streaming.embedded.buffer_records_max", self.buffer_records_max, 1, 1 << 20)
        in_range("streaming.embedded.buffer_bytes_max", self.buffer_bytes_max, 1 << 10, 1 << 30)


@section("streaming.job")
@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """batch_*_max: bounds of a micro-batch, per topic. dedup_horizon_s: how far behind a user's latest event an event
    may come. future_skew_max_s: how far an event time may be ahead of the record's. idle_ms: pause when nothing came.
    metrics_port: Prometheus text over HTTP on metrics_host, 0 = off; one job per port.
    """

    batch_records_max: int = 32_768
    batch_bytes_max: int = 16 << 20
    dedup_horizon_s: int = 86_400
    future_skew_max_s: int = 300
    idle_ms: int = 20
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0

    def __post_init__(self) -> None:
        in_range("streaming.job.batch_records_max", self.batch_records_max, 1, 1 << 20)
        in_range("streaming.job.batch_bytes_max", self.batch_bytes_max, 1 << 10, 1 << 30)
        in_range("streaming.job.dedup_horizon_s", self.dedup_horizon_s, 1, 30 * 86_400)
        in_range("streaming.job.future_skew_max_s", self.future_skew_max_s, 0, 86_400)
        in_range("streaming.job.idle_ms", self.idle_ms, 1, 10_000)
        in_range("streaming.job.metrics_port", self.metrics_port, 0, 65_535)
