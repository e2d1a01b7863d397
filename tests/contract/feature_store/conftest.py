"""Every OnlineStore that this release has, opened empty."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_world import emptied, redis_cluster, redis_server, redis_standalone, redis_url

from feature_store.online import MemoryStore, OnlineStore, open_store

__all__ = ["redis_cluster", "redis_server", "redis_standalone", "redis_url"]


@pytest.fixture(params=["memory", "embedded", "standalone", "cluster"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OnlineStore]:
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == "embedded":
        opened = open_store(f"embedded:{tmp_path}")
    else:
        opened = open_store(emptied(request, request.param))
    yield opened
    opened.close()
