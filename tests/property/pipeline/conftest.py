"""Loads the small shop that the tests of sources, ranking and pipeline share (tests have no packages, so by path)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_PATH = Path(__file__).parents[2] / "unit" / "pipeline" / "world.py"


@pytest.fixture(scope="session")
def shop() -> ModuleType:
    """tests/unit/pipeline/world.py, one instance per process."""
    name = "pipeline_world"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _PATH)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def store(shop):
    return shop.store()


@pytest.fixture(scope="session")
def run(shop, tmp_path_factory):
    return shop.write_run(tmp_path_factory.mktemp("shop") / "run")
