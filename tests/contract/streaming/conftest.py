"""Every log driver that this release has, with the topics created."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.config import StreamingConfig, Topics
from streaming.log import Log, open_log


@pytest.fixture(params=["embedded"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    with open_log(f"embedded:{tmp_path}") as opened:
        opened.create_topics(StreamingConfig(partitions=4).partitions_by_topic(Topics()))
        yield opened
