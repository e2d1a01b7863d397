"""Fixtures of tests/worlds/redis_world.py."""

from redis_world import redis_cluster, redis_server, redis_standalone, redis_url

__all__ = ["redis_cluster", "redis_server", "redis_standalone", "redis_url"]
