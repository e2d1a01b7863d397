"""Job and commands on a real broker, with each driver; what they say when there is none."""

import json
import time
from collections import Counter

import numpy as np
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from feature_store.online import MemoryStore, open_store
from recsys.cli.main import run
from recsys.core import EventBatch, Unavailable
from recsys.data import Dataset, simulate
from streaming.config import JobConfig, StreamingConfig, Topics
from streaming.job import Job
from streaming.log import open_log
from streaming.produce import produce

DRIVERS = ["confluent", "kafka-python"]
T, DAY = 1_600_000_000_000_000, 86_400_000_000


def world(n: int) -> EventBatch:
    rng = np.random.default_rng(3)
    return EventBatch.from_columns(
        {
            "event_id": [f"e{i}" for i in range(n)],
            "kind": [1] * n,
            "event_type": rng.integers(1, 7, n),
            "event_time": np.sort(T + rng.integers(0, 20 * DAY, n)),
            "user_id": [f"u{u}" for u in rng.zipf(1.5, n) % 50],
            "item_id": [f"i{i}" for i in rng.zipf(1.2, n) % 80],
        }
    )


@pytest.mark.parametrize("driver", DRIVERS)
def test_streamed_state_equals_the_dataset_folded_offline(kafka, kafka_config, driver, tmp_path):
    config, _ = kafka_config(driver)
    topics, events = config.get(Topics), world(4_000)
    store, offline = open_store(f"embedded:{tmp_path}"), MemoryStore()
    offline.apply(events)
    with open_log(f"kafka://{kafka}", config) as log:
        log.create_topics(StreamingConfig(partitions=4).partitions_by_topic(topics))
        produce([*events.chunks(500), events.slice(len(events) - 100, 100)], log, topics=topics)
        outcomes, deadline_s = Counter(), time.monotonic() + 240
        for enough in (1_500, len(events) + 100):  # the second job starts where the store is
            job = Job(log, store, JobConfig(batch_records_max=700), topics=topics)
            while (outcomes + job.report.events).total() < enough:
                assert time.monotonic() < deadline_s
                if not job.step():
                    time.sleep(0.005)
            job.close()
            outcomes += job.report.events
    assert outcomes == {"applied": len(events), "duplicate": 100}
    for kind, ids in (("user", [f"u{i}" for i in range(50)]), ("item", [f"i{i}" for i in range(80)])):
        assert store.load(kind, ids) == offline.load(kind, ids)
    store.close()


def lag_by_kafka(kafka, environ, events: str) -> dict[str, int]:
    """What a tool sees that knows of nothing but Kafka: by topic, log end minus what the one group of ours has said."""
    admin, topics = AdminClient({"bootstrap.servers": kafka}), {"events": events}
    for field in ("impressions", "catalog"):
        topics[field] = environ[f"DOUBLE11__STREAMING__TOPICS__{field.upper()}"]
    groups = [g.group_id for g in admin.list_consumer_groups().result().valid if g.group_id.startswith("double11-")]
    found = {}
    for group in groups:
        asked = ConsumerGroupTopicPartitions(group)
        said = admin.list_consumer_group_offsets([asked])[group].result().topic_partitions
        for field, topic in topics.items():
            at = {tp: tp.offset for tp in said if tp.topic == topic}
            ends = admin.list_offsets({TopicPartition(topic, p): OffsetSpec.latest() for p in range(8)})
            if len(at) == 8:
                found[field] = sum(
                    ends[TopicPartition(topic, tp.partition)].result().offset - o for tp, o in at.items()
                )
    return found


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_commands_take_a_kafka_url(kafka, kafka_config, driver, tmp_path, monkeypatch, capfd):
    _, environ = kafka_config(driver)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    def double11(*args: object) -> dict:
        assert run([*map(str, args), "--json"]) == 0
        return json.loads(capfd.readouterr().out.splitlines()[-1])

    named = environ["DOUBLE11__STREAMING__TOPICS__EVENTS"] + "-by-url"
    url, store, data = f"kafka://{kafka}/{named}", f"embedded:{tmp_path / 'home'}", tmp_path / "tiny"
    simulate("tiny", 3, data)
    assert double11("streaming", "init", "--log", url)["topics"][named] == 8
    produced = double11("produce", data, "--sink", url)["events"]
    assert produced >= Dataset.open(data).num_events
    double11("forget", "nobody", "--log", url)
    report = double11("ingest", "--source", url, "--store", store, "--until-caught-up")
    assert report["events"]["applied"] == produced + 1  # and the forget
    assert lag_by_kafka(kafka, environ, named) == {"events": 0, "impressions": 0, "catalog": 0}
    assert double11("dead-letter", "list", "--log", url)["dead_letters"] == []
    assert double11("dead-letter", "requeue", "--log", url)["requeued"] == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_broker_that_is_away_is_named(kafka_config, driver):
    config, _ = kafka_config(driver, request_timeout_ms=1_000, delivery_timeout_ms=2_000)
    with open_log("kafka://127.0.0.1:1", config) as log:
        for call in (lambda: log.create_topics({"t": 1}), lambda: log.end_offsets("t"), log.check):
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1.*Check that it runs"):
                call()
