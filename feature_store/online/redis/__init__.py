"""The Redis online store: standalone or Cluster, one writer, any number of readers (ADR 7)."""

from feature_store.online.redis.reader import RedisReader
from feature_store.online.redis.store import RedisStore

__all__ = ["RedisReader", "RedisStore"]
