"""Broker crashes, transactions and retention need Apache Kafka: collected where DOUBLE11_KAFKA_HOME is set."""

import os
from collections.abc import Callable

import pytest
from redis_world import redis_server
from streaming_world import World

__all__ = ["redis_server"]
NEED_KAFKA = ["test_kafka_faults.py", "test_broker_away.py", "test_rebalance.py", "test_retailrocket.py"]
collect_ignore = [] if os.environ.get("DOUBLE11_KAFKA_HOME") else NEED_KAFKA
if not os.environ.get("DOUBLE11_DATA"):
    collect_ignore = [*collect_ignore, "test_retailrocket.py"]


@pytest.fixture(params=["embedded", "kafka-redis" if os.environ.get("DOUBLE11_KAFKA_HOME") else "redis"])
def world(request: pytest.FixtureRequest, tmp_path, kafka_config: Callable) -> World:
    """A log with topics and an empty store beside it: in one folder, or on Kafka and Redis.

    Without Apache Kafka the log of a Redis is embedded: by tansu's end offsets one catches up too early.
    """
    small = {
        "DOUBLE11__STREAMING__PARTITIONS": "4",
        "DOUBLE11__FEATURE_STORE__REDIS__BUCKETS": "4",
        "DOUBLE11__STREAMING__JOB__BATCH_RECORDS_MAX": "150",
    }
    if request.param == "embedded":
        made = World(f"embedded:{tmp_path / 'home'}", f"embedded:{tmp_path / 'home'}", small)
    elif request.param == "redis":
        made = World(f"embedded:{tmp_path / 'home'}", request.getfixturevalue("redis_server").url, small)
    else:
        # By its name a consumer that was killed has its partitions again at once; without one, after the session.
        _, environ = kafka_config("confluent", group_instance_id="consumer")
        server = request.getfixturevalue("redis_server")
        made = World(f"kafka://{request.getfixturevalue('kafka')}", server.url, small | environ)
    made.init()
    return made
