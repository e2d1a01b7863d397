"""Apache Kafka killed, another producer's transactions, retention: what was acknowledged is there, once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from confluent_kafka import Producer as OtherProducer
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from feature_store.online import open_store
from recsys.core import Deadline, EventBatch, Unavailable, VersionMismatch
from streaming.config import JobConfig, StreamingConfig, Topics
from streaming.job import Job
from streaming.log import Consumer, open_log
from streaming.log.base import read_all
from streaming.produce import produce

DRIVERS = ["confluent", "kafka-python"]
T, DAY = 1_600_000_000_000_000, 86_400_000_000
EVENTS, PER_FLUSH, USERS = 6_000, 300, 20
GIVEN_UP_S = 240  # of a loaded machine
ANY = {"records_max": 10_000, "bytes_max": 1 << 24}


@pytest.fixture
def broker(mortal_kafka):
    return mortal_kafka


@pytest.fixture(params=DRIVERS)
def room(request, broker, kafka_config):
    """An open log with topics, and their names."""
    # A loaded machine takes long to start a broker again.
    config, _ = kafka_config(request.param, request_timeout_ms=60_000, delivery_timeout_ms=120_000)
    topics = config.get(Topics)
    with open_log(f"kafka://{broker.address}", config) as log:
        log.create_topics(StreamingConfig(partitions=2).partitions_by_topic(topics))
        yield log, topics


def some(first: int, number: int) -> EventBatch:
    """Purchases of users in turn, one a second."""
    at = range(first, first + number)
    return EventBatch.from_columns(
        {
            "event_id": [f"e{i}" for i in at],
            "kind": [1] * number,
            "event_type": [5] * number,
            "event_time": [T + i * 1_000_000 for i in at],
            "user_id": [f"u{i % USERS}" for i in at],
            "item_id": ["i"] * number,
        }
    )


def poll_until(consumer: Consumer, deadline_s: float) -> None:
    while time.monotonic() < deadline_s:
        consumer.poll(**ANY)


@pytest.mark.parametrize("room", ["confluent", pytest.param("kafka-python", marks=pytest.mark.slow)], indirect=True)
async def test_a_broker_killed_under_load_loses_nothing_and_the_job_goes_on(room, broker, tmp_path):
    log, topics = room
    store, stop, acknowledged = open_store(f"embedded:{tmp_path}"), threading.Event(), []
    job = Job(log, store, JobConfig(batch_records_max=500), topics=topics)
    reading = threading.Thread(target=job.run, kwargs={"stop": stop})

    def send() -> None:
        for first in range(0, EVENTS, PER_FLUSH):
            produce([some(first, PER_FLUSH)], log, topics=topics)
            acknowledged.append(first)
            time.sleep(0.01)

    writing = threading.Thread(target=send)
    reading.start()
    writing.start()
    while len(acknowledged) < EVENTS // PER_FLUSH // 4:
        time.sleep(0.01)
    broker.kill()
    assert writing.is_alive()
    broker.start()
    writing.join()
    assert len(acknowledged) == EVENTS // PER_FLUSH
    while job.report.records < EVENTS and reading.is_alive():
        time.sleep(0.05)
    stop.set()
    reading.join()
    # Each flush had a producer of its own, so nothing was sent twice and the log has each event once.
    assert job.report.events == {"applied": EVENTS}
    assert sum(map(len, read_all(log, topics.events))) == EVENTS
    for i in range(USERS):
        user = await store.user(f"u{i}", T + DAY, Deadline.never())
        assert user.values["purchase_count_all"] == EVENTS / USERS
    job.close()
    store.close()


def test_aborted_and_dangling_transactions_are_invisible_and_do_not_hold_up_for_long(room, broker, tmp_path):
    log, topics = room

    def other(name: str) -> OtherProducer:
        made = OtherProducer(
            {
                "bootstrap.servers": broker.address,
                "transactional.id": f"{topics.events}-{name}",
                "transaction.timeout.ms": 600_000,
            }
        )
        made.init_transactions(GIVEN_UP_S)
        made.begin_transaction()
        return made

    first, last = other("first"), other("last")
    for partition in (0, 1):
        first.produce(topics.events, b"aborted", b"k", partition)
    first.flush()
    first.abort_transaction()
    first.begin_transaction()
    first.produce(topics.events, b"committed", b"k", 0)
    first.commit_transaction()
    # Partition 0: aborted, marker, committed, marker. Partition 1: aborted, marker. Markers come a little later.
    deadline_s = time.monotonic() + GIVEN_UP_S
    while log.end_offsets(topics.events) != {0: 4, 1: 2}:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert [v for b in read_all(log, topics.events) for v in b.values] == [b"committed"]
    last.produce(topics.events, b"dangling", b"k", 0)
    last.flush()
    assert log.end_offsets(topics.events) == {0: 4, 1: 2}
    produce([some(0, 10)], log, topics=topics)
    other("last")  # whoever comes under its name ends it, as the broker does after its timeout
    store = open_store(f"embedded:{tmp_path}")
    job = Job(log, store, topics=topics)
    deadline_s = time.monotonic() + GIVEN_UP_S
    while job.report.records < 11 and time.monotonic() < deadline_s:
        job.step()
    job.run(until_caught_up=True)
    job.close()
    assert job.report.events == {"applied": 10}
    assert job.report.dead_letters == {"undecodable": 1}  # what the other producer committed is no event of ours
    assert store.offsets(topics.events) == log.end_offsets(topics.events)
    store.close()


@pytest.mark.parametrize("room", ["confluent"], indirect=True)
def test_who_is_to_end_waits_a_few_seconds_more_for_a_silent_broker(room, broker, kafka_config):
    """Of the minute and the two that calls and records have."""
    _, topics = room
    config, _ = kafka_config("confluent", request_timeout_ms=60_000, delivery_timeout_ms=120_000)
    stop, url = threading.Event(), f"kafka://{broker.address}"
    with open_log(url, config, stop=stop) as told, open_log(url, config) as closed, ThreadPoolExecutor() as threads:
        producer = told.producer()
        for log in (told, closed):
            log.end_offsets(topics.events)
        with broker.frozen():
            producer.send(topics.events, b"k", b"v", partition=0)
            calls = [threads.submit(call) for call in (told.log_id, producer.flush)]
            calls += [threads.submit(log.end_offsets, topics.events) for log in (told, closed)]
            assert not wait(calls, 2).done
            began_s = time.monotonic()
            stop.set()
            closed.close()
            assert {type(call.exception()) for call in calls} == {Unavailable}
            assert time.monotonic() - began_s < 15
            producer.abandon()


def test_records_that_retention_removed_are_missed_loudly(room, broker, tmp_path):
    log, topics = room
    produce([some(0, 200)], log, topics=topics)
    store = open_store(f"embedded:{tmp_path}")
    job = Job(log, store, JobConfig(batch_records_max=10), topics=topics)
    deadline_s = time.monotonic() + GIVEN_UP_S
    while not job.step() and time.monotonic() < deadline_s:
        pass
    job.close()
    ends = log.end_offsets(topics.events)
    admin = AdminClient({"bootstrap.servers": broker.address})
    for done in admin.delete_records([TopicPartition(topics.events, p, o) for p, o in ends.items()]).values():
        done.result()
    assert log.begin_offsets(topics.events) == ends
    with pytest.raises(VersionMismatch, match="features materialize"):
        Job(log, store, topics=topics)
    consumer = log.consumer(topics.events, dict.fromkeys(ends, 0))
    with pytest.raises(VersionMismatch, match="features materialize"):
        poll_until(consumer, deadline_s)
    consumer.close()
    store.close()
