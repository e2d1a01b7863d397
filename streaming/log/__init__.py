"""The durable log: events go in, offsets come out. `open_log(url)` gives the driver for a URL."""

from __future__ import annotations

from dataclasses import replace
from threading import Event as StopEvent

from recsys.core import BadInput, Clock
from recsys.core.config import Config
from recsys.core.urls import default_url, embedded_path, kafka_address, scheme
from streaming.config import EmbeddedLogConfig, KafkaConfig
from streaming.log.base import (
    SCHEMA_HEADER,
    SCHEMA_VERSION,
    STRESS_HEADER,
    Consumer,
    Log,
    Membership,
    Producer,
    RecordBatch,
)
from streaming.log.embedded import EmbeddedLog
from streaming.topics import Topics

__all__ = [
    "SCHEMA_HEADER",
    "SCHEMA_VERSION",
    "STRESS_HEADER",
    "Consumer",
    "Log",
    "Membership",
    "Producer",
    "RecordBatch",
    "default_url",
    "open_log",
    "topics_at",
]


def open_log(url: str, config: Config | None = None, clock: Clock | None = None, stop: StopEvent | None = None) -> Log:
    """The log at a URL; topics are made by `create_topics` (double11 streaming init).

    clock: stamps the records of an embedded log; on Kafka the broker does, and what producers have stamped counts up to
    what this says.
    stop: set when the process is to end; a call waits a few seconds more for a broker then.
    Raises: BadInput for a scheme without a driver, or a URL that is not one.
    """
    config = config or Config()
    if scheme(url) == "kafka":
        servers, _ = kafka_address(url, "log URL")
        settings, topics = config.get(KafkaConfig), topics_at(url, config)
        if settings.driver == "confluent":
            from streaming.log.kafka.confluent import ConfluentLog

            return ConfluentLog(servers, settings, topics, clock, stop)
        from streaming.log.kafka.kafka_python import KafkaPythonLog

        return KafkaPythonLog(servers, settings, topics, clock, stop)
    if scheme(url) != "embedded":
        raise BadInput("log URL", came=url, expected="embedded:PATH or kafka://HOST:PORT", fix="Use one of the two.")
    return EmbeddedLog(embedded_path(url, "log URL"), config.get(EmbeddedLogConfig), clock)


def topics_at(url: str, config: Config) -> Topics:
    """[streaming.topics], with `events` named by the URL where it names a topic: kafka://HOST:PORT/TOPIC."""
    topics = config.get(Topics)
    named = kafka_address(url, "log URL")[1] if scheme(url) == "kafka" else None
    return replace(topics, events=named) if named else topics
