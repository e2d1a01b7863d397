"""`streaming init` on Apache Kafka: what topics it makes, whose clock counts on them, and what it refuses."""

import time

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic
from streaming_world import World

from recsys.core import ManualClock, VersionMismatch
from streaming.config import StreamingConfig, Topics
from streaming.log import open_log
from streaming.log.base import read_all

DAY_MS = 86_400_000


@pytest.fixture
def world(kafka, kafka_config, tmp_path) -> World:
    _, environ = kafka_config("confluent")
    return World(f"kafka://{kafka}", f"embedded:{tmp_path}", environ | {"DOUBLE11__STREAMING__PARTITIONS": "4"})


def settings(world: World) -> dict[str, tuple[int, str, int]]:
    """By topic of ours: its partitions, cleanup policy, and days that the broker keeps records."""
    admin = AdminClient({"bootstrap.servers": world.log.removeprefix("kafka://")})
    present = admin.list_topics(timeout=60).topics
    found = {}
    for name in ("events", "impressions", "item_updates", "catalog", "samples", "deltas", "dead_letter"):
        topic = world.environ[f"DOUBLE11__STREAMING__TOPICS__{name.upper()}"]
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        said = admin.describe_configs([resource])[resource].result()
        assert said["message.timestamp.type"].value == "LogAppendTime"  # else a fast clock vouches for its own events
        kept = said["cleanup.policy"].value, int(said["retention.ms"].value) // DAY_MS
        found[name] = len(present[topic].partitions), *kept
    return found


def test_topics_are_made_once_and_kept_as_long_as_each_is_needed(world):
    world.init()
    made = settings(world)
    assert {n: p for n, (p, *_) in made.items()} == dict.fromkeys(made, 4) | {"deltas": 1, "dead_letter": 1}
    assert {n: policy for n, (_, policy, _) in made.items()} == dict.fromkeys(made, "delete") | {"catalog": "compact"}
    days = {n: kept for n, (*_, kept) in made.items() if n != "catalog"}
    assert days == dict.fromkeys(days, 7) | {"deltas": 30, "dead_letter": 30}
    world.init()
    assert settings(world) == made


def test_another_number_of_partitions_is_refused_with_what_to_do(world):
    world.init()
    world.environ["DOUBLE11__STREAMING__PARTITIONS"] = "8"
    error = world.double11("streaming", "init", "--log", world.log, code=VersionMismatch.exit_code)["error"]
    assert error["code"] == "VERSION_MISMATCH"
    assert "8 partitions; expected 4" in error["message"]
    assert "[streaming.topics]" in error["fix"]


def test_too_few_partitions_for_the_peak_are_refused_before_anything_is_made(world):
    asked = ("streaming", "init", "--log", world.log, "--peak-rate", 400_000, "--consumer-rate", 55_000)
    error = world.double11(*asked, code=2)["error"]
    assert "Set it to 16" in error["fix"]
    admin = AdminClient({"bootstrap.servers": world.log.removeprefix("kafka://")})
    assert world.environ["DOUBLE11__STREAMING__TOPICS__EVENTS"] not in admin.list_topics(timeout=60).topics
    world.environ["DOUBLE11__STREAMING__PARTITIONS"] = "16"
    assert world.double11(*asked)["topics"][world.environ["DOUBLE11__STREAMING__TOPICS__EVENTS"]] == 16
    assert world.double11("streaming", "init", "--log", world.log, "--peak-rate", 1, code=2)["error"]["fix"]


@pytest.mark.parametrize("driver", ["confluent", "kafka-python"])
def test_a_producers_clock_does_not_vouch_for_itself_and_the_brokers_does(kafka, kafka_config, driver):
    """A topic that others made keeps the times of producers; ours have the broker's, however slow the reader's is."""
    config, _ = kafka_config(driver)
    topics, admin = config.get(Topics), AdminClient({"bootstrap.servers": kafka})
    began_us = time.time_ns() // 1_000_000 * 1_000
    slow, fast_ms = ManualClock(began_us - 600_000_000), began_us // 1_000 + 1_800_000
    made = NewTopic(topics.catalog, 1, 1, config={"message.timestamp.type": "CreateTime"})
    admin.create_topics([made])[topics.catalog].result()
    producer = Producer({"bootstrap.servers": kafka})
    with open_log(f"kafka://{kafka}", config, slow) as log:
        log.create_topics(StreamingConfig(partitions=1).partitions_by_topic(topics))
        for topic in (topics.catalog, topics.events):
            producer.produce(topic, b"v", timestamp=fast_ms)
        producer.flush()
        (theirs,), (ours,) = (list(read_all(log, topic)) for topic in (topics.catalog, topics.events))
    assert theirs.append_us.tolist() == [slow.at_us]
    assert began_us <= ours.append_us[0] <= time.time_ns() // 1_000
