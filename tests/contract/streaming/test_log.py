"""What every Log does, whatever driver."""

import subprocess
import sys
import threading
import time

import pytest

from recsys.core import BadInput, NotFound, VersionMismatch
from recsys.core.murmur2 import partition_of
from streaming.log.base import VALUE_BYTES_MAX, read_all

ANY = {"records_max": 10_000, "bytes_max": 1 << 24}
ARRIVAL_S = 120


def send(log, topic, values, key=b"k", headers=None):
    """One batch for each record: see kafka_broker.py about tansu's end offsets."""
    producer = log.producer()
    for v in values:
        producer.send(topic, key, v, headers)
        producer.flush()
    producer.close()


def arrived(consumer, number, **bounds):
    """Batches of polls until there are that many records."""
    batches, deadline_s = [], time.monotonic() + ARRIVAL_S
    while sum(map(len, batches)) < number:
        assert time.monotonic() < deadline_s, f"{sum(map(len, batches))} of {number} records"
        batches += (found := consumer.poll(**(bounds or ANY)))
        if not found:
            time.sleep(0.005)
    consumer.close()
    return [b for b in batches if len(b)]


def values(batches):
    return [v for b in batches for v in b.values]


def test_a_partition_gives_back_what_went_in_in_order(log, topics):
    send(log, topics.events, [b"a", b"", b"c"], headers={"schema": b"1", "stress": b""})
    p = partition_of(b"k", 4)
    batches = arrived(log.consumer(topics.events, {p: 0}), 3)
    assert {(b.topic, b.partition) for b in batches} == {(topics.events, p)}
    assert values(batches) == [b"a", b"", b"c"]
    assert [k for b in batches for k in b.keys] == [b"k"] * 3
    assert [o for b in batches for o in b.offset.tolist()] == [0, 1, 2]
    assert [h for b in batches for h in b.headers] == [{"schema": b"1", "stress": b""}] * 3
    assert batches[-1].next_offset == 3


def test_a_partition_can_be_named(log, topics):
    producer = log.producer()
    for partition in (3, 1, 3):
        producer.send(topics.catalog, b"k", b"%d" % partition, None, partition)
        producer.flush()
    for wrong in (-1, 4):
        with pytest.raises(BadInput, match=f"partition {wrong}; expected 0 to 3"):
            producer.send(topics.catalog, b"k", b"v", None, wrong)
    producer.close()
    batches = arrived(log.consumer(topics.catalog, dict.fromkeys(range(4), 0)), 3)
    assert {(b.partition, v) for b in batches for v in b.values} == {(3, b"3"), (1, b"1")}


def test_a_record_says_when_the_log_took_it(log, topics):
    began_us = time.time_ns() // 1_000_000 * 1_000  # a Kafka record's time is in whole milliseconds
    send(log, topics.events, [b"a"])
    (batch,) = arrived(log.consumer(topics.events, {partition_of(b"k", 4): 0}), 1)
    assert began_us <= batch.append_us[0] <= time.time_ns() // 1_000


def test_offsets_of_empty_and_filled_partitions(log, topics):
    send(log, topics.events, [b"x"] * 5)
    p = partition_of(b"k", 4)
    assert log.begin_offsets(topics.events) == dict.fromkeys(range(4), 0)
    assert log.end_offsets(topics.events) == {q: 5 if q == p else 0 for q in range(4)}
    assert log.end_offsets(topics.catalog) == dict.fromkeys(range(4), 0)


def test_reading_goes_on_from_any_offset_and_waits_for_more(log, topics):
    send(log, topics.events, [b"0", b"1", b"2"])
    p = partition_of(b"k", 4)
    assert values(arrived(log.consumer(topics.events, {p: 2}), 1)) == [b"2"]
    consumer = log.consumer(topics.events, {p: 3})
    assert values(consumer.poll(**ANY)) == []
    send(log, topics.events, [b"3"])
    assert values(arrived(consumer, 1)) == [b"3"]


def test_polls_are_bounded_but_always_move(log, topics):
    send(log, topics.events, [b"x" * 1_000] * 10)
    start = log.begin_offsets(topics.events)
    sizes = [len(b) for b in arrived(log.consumer(topics.events, start), 10, records_max=4, bytes_max=1)]
    assert sizes == [1] * 10
    consumer = log.consumer(topics.events, start)
    for _ in range(100):
        assert sum(map(len, consumer.poll(records_max=4, bytes_max=1 << 20))) <= 4
    consumer.close()


def test_no_partition_starves(log, topics):
    """More is written to each than is read of all: served to its end first, one would keep the others waiting."""
    producer = log.producer()
    consumer = log.consumer(topics.events, log.begin_offsets(topics.events))
    seen, deadline_s = set(), time.monotonic() + ARRIVAL_S
    while seen != {0, 1, 2, 3}:
        assert time.monotonic() < deadline_s, f"only of partitions {seen}"
        for i in range(64):
            producer.send(topics.events, b"user-%d" % i, b"x")
        producer.flush()
        seen |= {b.partition for b in consumer.poll(records_max=8, bytes_max=1 << 20) if len(b)}
    consumer.close()
    producer.close()


def test_many_threads_and_processes_append(log, topics, driver):
    code = f"""
from recsys.core.config import Config
from streaming.log import open_log
with open_log({driver.url!r}, Config.load()) as log:
    producer = log.producer()
    for i in range(500):
        producer.send({topics.events!r}, b"k%d" % i, b"p")
        if i % 50 == 0:
            producer.flush()
    producer.close()
"""
    others = [subprocess.Popen([sys.executable, "-c", code], env=driver.environ) for _ in range(2)]
    producer = log.producer()

    def work() -> None:
        for i in range(300):
            producer.send(topics.events, b"k%d" % i, b"t")
            if i % 10 == 0:
                producer.flush()
        producer.flush()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    producer.close()
    assert [o.wait() for o in others] == [0, 0]
    found = values(arrived(log.consumer(topics.events, log.begin_offsets(topics.events)), 1_900))
    assert (found.count(b"p"), found.count(b"t")) == (1_000, 900)


def test_everything_is_read_up_to_where_the_end_was(log, topics):
    for key in (b"a", b"b", b"c"):
        send(log, topics.events, [b"1", b"2"], key=key)
    assert sorted(values(read_all(log, topics.events))) == [b"1"] * 3 + [b"2"] * 3
    assert list(read_all(log, topics.catalog)) == []


def test_too_large_a_value_is_refused_and_a_mebibyte_is_not(log, topics):
    producer = log.producer()
    with pytest.raises(BadInput, match="1048577 bytes"):
        producer.send(topics.events, b"k", bytes(VALUE_BYTES_MAX + 1))
    producer.close()
    send(log, topics.events, [bytes(VALUE_BYTES_MAX)])
    assert [len(v) for v in values(read_all(log, topics.events))] == [VALUE_BYTES_MAX]


def test_an_unknown_topic_names_the_command(log):
    with pytest.raises(NotFound, match="streaming init"):
        log.consumer("nope", {0: 0})
    producer = log.producer()
    with pytest.raises(NotFound):
        producer.send("nope", b"k", b"v")
    producer.close()


def test_creating_again_is_harmless_and_never_changes_p(log, topics):
    log.create_topics({topics.events: 4})
    with pytest.raises(VersionMismatch, match="8 partitions"):
        log.create_topics({topics.events: 8})
    assert log.num_partitions(topics.events) == 4


def test_a_producer_that_is_abandoned_takes_back_nothing_that_was_flushed(log, topics):
    producer = log.producer()
    producer.send(topics.events, b"k", b"kept")
    producer.flush()
    producer.send(topics.events, b"k", b"perhaps")
    producer.abandon()
    send(log, topics.events, [b"later"])
    found = values(read_all(log, topics.events))
    assert [v for v in found if v != b"perhaps"] == [b"kept", b"later"]


def test_a_consumer_can_be_sent_elsewhere(log, topics):
    for key in (b"e", b"k"):
        send(log, topics.events, [b"%s%d" % (key, i) for i in range(3)], key=key)
    home, other = partition_of(b"k", 4), partition_of(b"e", 4)
    assert home != other
    consumer = log.consumer(topics.events, {home: 2})
    deadline_s = time.monotonic() + ARRIVAL_S
    while not values(consumer.poll(records_max=1, bytes_max=1)):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    consumer.assign({other: 1, home: 1})
    found = arrived(consumer, 4)
    assert {b.partition for b in found} == {home, other}
    assert sorted(values(found)) == [b"e1", b"e2", b"k1", b"k2"]
