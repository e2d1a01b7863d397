"""Configuration of streaming: its job and its logs; [streaming] and [streaming.topics] are in topics.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recsys.core.config import in_range, section
from recsys.core.errors import BadInput
from streaming.topics import StreamingConfig, Topics

_HEARTBEAT_MS = 3_000

__all__ = [
    "ArchiveConfig",
    "EmbeddedLogConfig",
    "JobConfig",
    "KafkaConfig",
    "SamplesConfig",
    "StreamingConfig",
    "Topics",
]


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


@section("streaming.kafka")
@dataclass(frozen=True, kw_only=True, slots=True)
class KafkaConfig:
    """Where the brokers are is in the log's URL; secrets are in files.

    driver: confluent (librdkafka) is ten times as fast as kafka-python, which is pure Python.

    sasl_password_file: a file with nothing but the password. ssl_*_file: PEM; without a CA, the system's.
    prefetch_bytes_max: records a consumer holds before they are asked for. buffer_bytes_max, linger_ms, compression:
    of producers. replication_factor, min_insync_replicas: of topics that `streaming init` creates.
    retention_s, dead_letter_retention_s, deltas_retention_s: of topics that it creates, how long records are kept: of
    events, impressions, item-updates and samples; of dead letters; of deltas. catalog_history_s: of `catalog`: how long
    every record can be read; after that the newest of each key.
    request_timeout_ms: how long a broker may be silent; delivery_timeout_ms: how long a record may take to be durable,
    so how long a broker may be away before `flush` gives up. session_timeout_ms: after how long a silent member's
    partitions go to others. group_instance_id: a lasting name, one per process (a pod's), so that a restart within the
    session moves no partitions; "" = none.
    """

    driver: Literal["confluent", "kafka-python"] = "confluent"
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    sasl_username: str = ""
    sasl_password_file: Path | None = None
    ssl_ca_file: Path | None = None
    ssl_cert_file: Path | None = None
    ssl_key_file: Path | None = None
    prefetch_bytes_max: int = 64 << 20
    buffer_bytes_max: int = 64 << 20
    linger_ms: int = 5
    compression: Literal["none", "lz4", "zstd", "gzip"] = "lz4"
    replication_factor: int = 3
    min_insync_replicas: int = 2
    retention_s: int = 7 * 86_400
    dead_letter_retention_s: int = 30 * 86_400
    deltas_retention_s: int = 30 * 86_400
    catalog_history_s: int = 86_400
    request_timeout_ms: int = 30_000
    delivery_timeout_ms: int = 120_000
    session_timeout_ms: int = 10_000
    group_instance_id: str = ""

    def __post_init__(self) -> None:
        in_range("streaming.kafka.prefetch_bytes_max", self.prefetch_bytes_max, 4 << 20, 1 << 31)
        in_range("streaming.kafka.buffer_bytes_max", self.buffer_bytes_max, 4 << 20, 1 << 31)
        in_range("streaming.kafka.linger_ms", self.linger_ms, 0, 1_000)
        in_range("streaming.kafka.replication_factor", self.replication_factor, 1, 100)
        in_range("streaming.kafka.min_insync_replicas", self.min_insync_replicas, 1, self.replication_factor)
        for name in ("retention_s", "dead_letter_retention_s", "deltas_retention_s", "catalog_history_s"):
            in_range(f"streaming.kafka.{name}", getattr(self, name), 1, 3_650 * 86_400)
        in_range("streaming.kafka.request_timeout_ms", self.request_timeout_ms, 1_000, 300_000)
        low = self.request_timeout_ms + self.linger_ms
        in_range("streaming.kafka.delivery_timeout_ms", self.delivery_timeout_ms, low, 3_600_000)
        in_range("streaming.kafka.session_timeout_ms", self.session_timeout_ms, 1_000, 1_800_000)
        if self.security_protocol.startswith("SASL") and not (self.sasl_username and self.sasl_password_file):
            raise BadInput(
                "configuration [streaming.kafka]",
                came=f"security_protocol {self.security_protocol} without a name and a password",
                expected="sasl_username and sasl_password_file",
                fix="Set both; the password is the file's only content.",
            )

    @property
    def heartbeat_ms(self) -> int:
        """How often a member of a group is heard of; it learns of a rebalance no sooner."""
        return min(_HEARTBEAT_MS, self.session_timeout_ms // 3)

    def password(self) -> str:
        """The SASL password. Raises: BadInput for a file that cannot be read."""
        assert self.sasl_password_file is not None, "__post_init__ checked it"
        try:
            return self.sasl_password_file.read_text("utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                "configuration streaming.kafka.sasl_password_file",
                came=f"{self.sasl_password_file}: {type(error).__name__}",
                expected="a readable text file",
                fix="Correct the path or the file's mode.",
            ) from error


@section("streaming.job")
@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """batch_*_max: bounds of a micro-batch, per topic. step_bytes_max: of state that a step writes; one that wrote more
    makes the next ones smaller. dedup_horizon_s: how far behind a user's latest event an event may come.
    future_skew_max_s: how far an event time may be ahead of the record's. idle_ms: pause when nothing came.
    away_s_max: how long store or log may be away before the job gives up, start_s_max: the same when it starts; it asks
    again after retry_ms, then twice that, up to retry_ms_max. metrics_port: Prometheus text over HTTP on metrics_host,
    0 = off; one job per port.
    """

    batch_records_max: int = 131_072
    batch_bytes_max: int = 16 << 20
    step_bytes_max: int = 12 << 20
    dedup_horizon_s: int = 86_400
    future_skew_max_s: int = 300
    idle_ms: int = 20
    away_s_max: int = 600
    start_s_max: int = 60
    retry_ms: int = 50
    retry_ms_max: int = 2_000
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0

    def __post_init__(self) -> None:
        in_range("streaming.job.batch_records_max", self.batch_records_max, 1, 1 << 20)
        in_range("streaming.job.batch_bytes_max", self.batch_bytes_max, 1 << 10, 1 << 30)
        in_range("streaming.job.step_bytes_max", self.step_bytes_max, 1 << 10, 1 << 32)
        in_range("streaming.job.dedup_horizon_s", self.dedup_horizon_s, 1, 30 * 86_400)
        in_range("streaming.job.future_skew_max_s", self.future_skew_max_s, 0, 86_400)
        in_range("streaming.job.idle_ms", self.idle_ms, 1, 10_000)
        in_range("streaming.job.away_s_max", self.away_s_max, 0, 86_400)
        in_range("streaming.job.start_s_max", self.start_s_max, 0, 86_400)
        in_range("streaming.job.retry_ms", self.retry_ms, 1, 10_000)
        in_range("streaming.job.retry_ms_max", self.retry_ms_max, self.retry_ms, 60_000)
        in_range("streaming.job.metrics_port", self.metrics_port, 0, 65_535)


@section("streaming.archive")
@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveConfig:
    """flush_*: the journal becomes day files when it has so many rows or is so old. tidy_s: how often small files are
    merged and forgotten users' rows erased. Files below small_bytes_max are merged when a day is over, or has
    merge_files_min of them, up to merged_bytes_max; what was merged is deleted after merged_keep_s. purge_files_max:
    files looked through at once for rows of forgotten users.
    """

    flush_rows_max: int = 1 << 18
    flush_s: float = 60.0
    tidy_s: float = 60.0
    small_bytes_max: int = 32 << 20
    merge_files_min: int = 16
    merged_bytes_max: int = 256 << 20
    merged_keep_s: float = 600.0
    purge_files_max: int = 16

    def __post_init__(self) -> None:
        in_range("streaming.archive.flush_rows_max", self.flush_rows_max, 1, 1 << 24)
        in_range("streaming.archive.flush_s", self.flush_s, 0.01, 3_600)
        in_range("streaming.archive.tidy_s", self.tidy_s, 0.01, 86_400)
        in_range("streaming.archive.small_bytes_max", self.small_bytes_max, 1 << 10, 1 << 30)
        in_range("streaming.archive.merge_files_min", self.merge_files_min, 2, 10_000)
        in_range("streaming.archive.merged_bytes_max", self.merged_bytes_max, self.small_bytes_max, 1 << 32)
        in_range("streaming.archive.merged_keep_s", self.merged_keep_s, 0, 86_400)
        in_range("streaming.archive.purge_files_max", self.purge_files_max, 1, 1 << 20)


@section("streaming.samples")
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplesConfig:
    """window_s: how long after an impression an action counts as its label. grace_s: how far behind the newest event
    others are waited for; what comes later becomes a late label. slice_s: impressions are joined by stretches of this
    length, 0 = a sixteenth of the window, between 1 s and 1 h. late_s: how often late labels are joined. idle_s: a
    partition that has been silent for so long holds no window open; when all have, the clock closes them. rows_max:
    impressions joined at once, of one partition.
    """

    window_s: float = 86_400.0
    grace_s: float = 2.0
    slice_s: float = 0.0
    late_s: float = 5.0
    idle_s: float = 30.0
    rows_max: int = 1 << 18

    def __post_init__(self) -> None:
        in_range("streaming.samples.window_s", self.window_s, 1, 30 * 86_400)
        in_range("streaming.samples.grace_s", self.grace_s, 0, 86_400)
        in_range("streaming.samples.slice_s", self.slice_s, 0, self.window_s)
        in_range("streaming.samples.late_s", self.late_s, 0.01, 3_600)
        in_range("streaming.samples.idle_s", self.idle_s, 0.1, 3_600)
        in_range("streaming.samples.rows_max", self.rows_max, 1, 1 << 24)

    @property
    def slice_us(self) -> int:
        """Length of a slice."""
        return int((self.slice_s or min(max(self.window_s / 16, 1), 3_600)) * 1e6)
