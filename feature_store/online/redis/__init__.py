"""The Redis online store: standalone or Cluster, several writers, any number of readers (ADR 8)."""

from feature_store.online.redis.reader import RedisReader
from feature_store.online.redis.store import RedisStore

__all__ = ["RedisReader", "RedisStore"]
