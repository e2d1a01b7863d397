"""Real Redis servers (tests have no packages, so they are loaded by path)."""

import importlib.util
import sys
from pathlib import Path

if "redis_server" not in sys.modules:
    _PATH = Path(__file__).parents[2] / "contract" / "feature_store" / "redis_server.py"
    _SPEC = importlib.util.spec_from_file_location("redis_server", _PATH)
    sys.modules["redis_server"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["redis_server"])
_SERVERS = sys.modules["redis_server"]
redis_standalone, redis_cluster, redis_url = _SERVERS.redis_standalone, _SERVERS.redis_cluster, _SERVERS.redis_url
redis_server = _SERVERS.redis_server
