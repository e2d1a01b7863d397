"""The durable log: events go in, offsets come out. `open_log(url)` gives the driver for a URL."""

from __future__ import annotations

from recsys.core import BadInput, Clock
from recsys.core.config import Config
from recsys.core.urls import default_url, embedded_path, scheme
from streaming.config import EmbeddedLogConfig
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION, STRESS_HEADER, Consumer, Log, Producer, RecordBatch
from streaming.log.embedded import EmbeddedLog

__all__ = [
    "SCHEMA_HEADER",
    "SCHEMA_VERSION",
    "STRESS_HEADER",
    "Consumer",
    "Log",
    "Producer",
    "RecordBatch",
    "default_url",
    "open_log",
]


def open_log(url: str, config: Config | None = None, clock: Clock | None = None) -> Log:
    """The log at a URL; topics are made by `create_topics` (double11 streaming init).

    Raises: BadInput for a scheme without a driver in this release.
    """
    if scheme(url) == "embedded":
        return EmbeddedLog(embedded_path(url, "log URL"), (config or Config()).get(EmbeddedLogConfig), clock)
    raise BadInput(
        "log URL",
        came=url,
        expected="embedded:PATH, the one driver of this release",
        fix="Use embedded:PATH; the Kafka driver comes with a later release.",
    )
