"""Every OnlineStore that this release has, opened empty."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_store.online import MemoryStore, OnlineStore, open_store

if "redis_server" not in sys.modules:
    _SPEC = importlib.util.spec_from_file_location("redis_server", Path(__file__).parent / "redis_server.py")
    sys.modules["redis_server"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["redis_server"])
_SERVERS = sys.modules["redis_server"]
redis_standalone, redis_cluster, redis_url = _SERVERS.redis_standalone, _SERVERS.redis_cluster, _SERVERS.redis_url
redis_server = _SERVERS.redis_server


@pytest.fixture(params=["memory", "embedded", "standalone", "cluster"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OnlineStore]:
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == "embedded":
        opened = open_store(f"embedded:{tmp_path}")
    else:
        opened = open_store(_SERVERS.emptied(request, request.param))
    yield opened
    opened.close()
