"""Every OnlineStore that this release has, opened empty."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_store.online import MemoryStore, OnlineStore, open_store


@pytest.fixture(params=["memory", "embedded"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OnlineStore]:
    opened = MemoryStore() if request.param == "memory" else open_store(f"embedded:{tmp_path}")
    yield opened
    opened.close()
