"""The Kafka log: one behaviour, two client libraries. Import a driver's module to load its library."""

from streaming.log.kafka.config import KafkaConfig

__all__ = ["KafkaConfig"]
