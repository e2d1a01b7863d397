"""Real Redis servers (tests have no packages, so they are loaded by path)."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if "redis_server" not in sys.modules:
    _PATH = Path(__file__).parents[2] / "contract" / "feature_store" / "redis_server.py"
    _SPEC = importlib.util.spec_from_file_location("redis_server", _PATH)
    sys.modules["redis_server"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["redis_server"])
_SERVERS = sys.modules["redis_server"]
redis_standalone, redis_cluster, redis_url = _SERVERS.redis_standalone, _SERVERS.redis_cluster, _SERVERS.redis_url


@pytest.fixture
def redis_server(tmp_path: Path, used_server: Callable[[str, str], None]) -> Iterator[object]:
    """A standalone server of this test's own, to be killed and started again."""
    server = _SERVERS.Server(tmp_path / "redis")
    used_server("redis", f"Redis {server.client.info('server')['redis_version']}, {_SERVERS.executable()[1]}")
    yield server
    server.stop()
