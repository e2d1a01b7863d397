"""Broker crashes, transactions and retention need Apache Kafka: collected where DOUBLE11_KAFKA_HOME is set."""

import os
from collections.abc import Callable

import pytest
from redis_world import redis_server
from streaming_world import World

__all__ = ["redis_server"]
collect_ignore = [] if os.environ.get("DOUBLE11_KAFKA_HOME") else ["test_kafka_faults.py", "test_broker_away.py"]


@pytest.fixture(params=["embedded", "kafka-redis"])
def world(request: pytest.FixtureRequest, tmp_path, kafka_config: Callable) -> World:
    """A log with topics and an empty store beside it: in one folder, or on Kafka and Redis."""
    small = {
        "DOUBLE11__STREAMING__PARTITIONS": "4",
        "DOUBLE11__FEATURE_STORE__REDIS__BUCKETS": "4",
        "DOUBLE11__STREAMING__JOB__BATCH_RECORDS_MAX": "150",
    }
    if request.param == "embedded":
        made = World(f"embedded:{tmp_path / 'home'}", f"embedded:{tmp_path / 'home'}", small)
    else:
        _, environ = kafka_config("confluent")
        server = request.getfixturevalue("redis_server")
        made = World(f"kafka://{request.getfixturevalue('kafka')}", server.url, small | environ)
    made.init()
    return made
