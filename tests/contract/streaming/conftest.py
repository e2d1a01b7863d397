"""Every log driver that this release has, with the topics created: on a folder, and on a real broker."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from recsys.core.config import Config
from streaming.config import StreamingConfig, Topics
from streaming.log import Log, open_log

# tansu, which stands in for Apache Kafka where there is no Java, does not carry a cooperative rebalance through.
collect_ignore = [] if os.environ.get("DOUBLE11_KAFKA_HOME") else ["test_membership.py"]


@dataclass(frozen=True)
class Driver:
    """Where a log is, its configuration, and the environment that tells another process the same."""

    url: str
    config: Config
    environ: dict[str, str]


@pytest.fixture(params=["embedded", "confluent", "kafka-python"])
def driver(request: pytest.FixtureRequest, tmp_path: Path, kafka_config: Callable) -> Driver:
    if request.param == "embedded":
        return Driver(f"embedded:{tmp_path}", Config(), dict(os.environ))
    config, environ = kafka_config(request.param)
    return Driver(f"kafka://{request.getfixturevalue('kafka')}", config, os.environ | environ)


@pytest.fixture
def topics(driver: Driver) -> Topics:
    return driver.config.get(Topics)


@pytest.fixture
def log(driver: Driver, topics: Topics) -> Iterator[Log]:
    with open_log(driver.url, driver.config) as opened:
        opened.create_topics(StreamingConfig(partitions=4).partitions_by_topic(topics))
        yield opened
