"""Fixtures of tests/e2e/serving/world.py (tests have no packages, so it is loaded by path)."""

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).parents[2] / "e2e" / "serving" / "world.py"
if "serving_world" not in sys.modules:
    _SPEC = importlib.util.spec_from_file_location("serving_world", _PATH)
    sys.modules["serving_world"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["serving_world"])
_WORLD = sys.modules["serving_world"]

home, dataset, run, live_home = _WORLD.home, _WORLD.dataset, _WORLD.run, _WORLD.live_home
shoppers, serve = _WORLD.shoppers, _WORLD.serve
