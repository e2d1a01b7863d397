"""What every Log does, whatever driver."""

import subprocess
import sys
import threading

import pytest

from recsys.core import BadInput, NotFound, VersionMismatch
from recsys.core.murmur2 import partition_of
from streaming.log.base import VALUE_BYTES_MAX, read_all

ANY = {"records_max": 10_000, "bytes_max": 1 << 24}


def send(log, values, key=b"k", topic="events", headers=None):
    producer = log.producer()
    for v in values:
        producer.send(topic, key, v, headers)
    producer.close()


def test_a_partition_gives_back_what_went_in_in_order(log):
    send(log, [b"a", b"", b"c"], headers={"schema": b"1", "stress": b""})
    p = partition_of(b"k", 4)
    (batch,) = log.consumer("events", {p: 0}).poll(**ANY)
    assert (batch.topic, batch.partition) == ("events", p)
    assert batch.values == [b"a", b"", b"c"]
    assert batch.keys == [b"k"] * 3
    assert batch.offset.tolist() == [0, 1, 2]
    assert batch.headers[0] == {"schema": b"1", "stress": b""}
    assert batch.append_us[0] > 1_700_000_000_000_000
    assert batch.next_offset == 3


def test_offsets_of_empty_and_filled_partitions(log):
    send(log, [b"x"] * 5)
    p = partition_of(b"k", 4)
    assert log.begin_offsets("events") == dict.fromkeys(range(4), 0)
    assert log.end_offsets("events") == {q: 5 if q == p else 0 for q in range(4)}
    assert log.end_offsets("catalog") == dict.fromkeys(range(4), 0)


def test_reading_goes_on_from_any_offset_and_waits_for_more(log):
    send(log, [b"0", b"1", b"2"])
    consumer = log.consumer("events", {partition_of(b"k", 4): 2})
    assert [b.values for b in consumer.poll(**ANY)] == [[b"2"]]
    assert consumer.poll(**ANY) == []
    send(log, [b"3"])
    assert [b.values for b in consumer.poll(**ANY)] == [[b"3"]]


def test_polls_are_bounded_but_always_move(log):
    send(log, [b"x" * 1_000] * 10)
    consumer = log.consumer("events", log.begin_offsets("events"))
    sizes = []
    while batches := consumer.poll(records_max=4, bytes_max=1):
        sizes.append(sum(map(len, batches)))
    assert sum(sizes) == 10
    assert max(sizes) == 1
    consumer = log.consumer("events", log.begin_offsets("events"))
    assert sum(map(len, consumer.poll(records_max=4, bytes_max=1 << 20))) <= 4


def test_no_partition_starves(log):
    for i in range(64):
        send(log, [b"x"] * 20, key=b"user-%d" % i)
    consumer, seen = log.consumer("events", log.begin_offsets("events")), set()
    for _ in range(4):
        seen |= {b.partition for b in consumer.poll(records_max=8, bytes_max=1 << 20)}
    assert seen == {0, 1, 2, 3}


def test_many_threads_and_processes_append(log, tmp_path):
    code = f"""
from streaming.log import open_log
with open_log("embedded:{tmp_path}") as log:
    producer = log.producer()
    for i in range(500):
        producer.send("events", b"k%d" % i, b"p")
        if i % 50 == 0:
            producer.flush()
    producer.close()
"""
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    producer = log.producer()

    def work() -> None:
        for i in range(300):
            producer.send("events", b"k%d" % i, b"t")
            producer.flush()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [o.wait() for o in others] == [0, 0]
    values = [v for batch in read_all(log, "events") for v in batch.values]
    assert (values.count(b"p"), values.count(b"t")) == (1_000, 900)


def test_too_large_a_value_is_refused_and_a_mebibyte_is_not(log):
    with pytest.raises(BadInput, match="1048577 bytes"):
        log.producer().send("events", b"k", bytes(VALUE_BYTES_MAX + 1))
    send(log, [bytes(VALUE_BYTES_MAX)])
    assert [len(v) for b in read_all(log, "events") for v in b.values] == [VALUE_BYTES_MAX]


def test_an_unknown_topic_names_the_command(log):
    with pytest.raises(NotFound, match="streaming init"):
        log.consumer("nope", {0: 0})
    with pytest.raises(NotFound):
        log.producer().send("nope", b"k", b"v")


def test_creating_again_is_harmless_and_never_changes_p(log):
    log.create_topics({"events": 4})
    with pytest.raises(VersionMismatch, match="8 partitions"):
        log.create_topics({"events": 8})
    assert log.num_partitions("events") == 4
