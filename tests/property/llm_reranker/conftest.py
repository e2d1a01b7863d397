"""Loads the shared synthetic world of the reranker tests (tests have no packages, so by path)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from recsys.core.run_dir import RunDirectory

_PATH = Path(__file__).parents[2] / "unit" / "llm_reranker" / "world.py"


@pytest.fixture(scope="session")
def world() -> ModuleType:
    """tests/unit/llm_reranker/world.py, one instance per process."""
    name = "llm_reranker_world"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _PATH)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def run(world: ModuleType) -> RunDirectory:
    """A run with a tiny distilled reranker."""
    return world.distilled_run()
