"""Group commit on a real embedded log: durable when acknowledged, bounded, honest about failures."""

import asyncio
import threading

import pytest
from double11.v1 import event_pb2

from recsys.core import Deadline, DeadlineExceeded, Double11Error, Overloaded, Query, Slate, SlateItem, Tier, metrics
from recsys.serving.impressions import Impressions
from recsys.serving.log_writer import LogWriter, Record
from streaming.log.base import read_all
from streaming.log.embedded import EmbeddedLog, EmbeddedLogConfig

BYTES_MAX = 1 << 21


@pytest.fixture
def log(tmp_path):
    with EmbeddedLog(tmp_path, EmbeddedLogConfig(map_bytes_max=1 << 20)) as opened:
        opened.create_topics({"events": 2, "impressions": 2})
        yield opened


def record(i, size=10):
    return Record(topic="events", key=str(i).encode(), value=b"v" * size, headers={"n": str(i).encode()})


def stored(log, topic="events"):
    return [r for batch in read_all(log, topic) for r in zip(batch.keys, batch.values, batch.headers, strict=True)]


async def test_acknowledged_means_durable_and_headers_are_kept(log):
    writer = LogWriter(log.producer(), BYTES_MAX)
    await asyncio.gather(*(writer.append([record(i), record(i + 100)], Deadline.after_ms(10_000)) for i in range(50)))
    found = stored(log)
    assert {k for k, _, _ in found} == {str(i).encode() for i in [*range(50), *range(100, 150)]}
    assert all(headers == {"n": key} for key, _, headers in found)
    assert writer.close(5.0)


def test_close_flushes_what_is_waiting(log):
    writer, results = LogWriter(log.producer(), BYTES_MAX), []
    for i in range(100):
        assert writer.offer([record(i)], results.append)
    assert writer.close(5.0)
    assert results == [None] * 100
    assert len(stored(log)) == 100


async def test_full_disk_is_told_to_the_caller_and_later_records_still_try(log):
    writer = LogWriter(log.producer(), 8 << 20)
    with pytest.raises(Double11Error):
        await writer.append([record(i, size=200_000) for i in range(20)], Deadline.after_ms(10_000))
    assert stored(log) == []
    await writer.append([record(1)], Deadline.after_ms(10_000))
    assert len(stored(log)) == 1
    writer.close(5.0)


class StuckProducer:
    """A log that does not answer, as a broker that is away."""

    def __init__(self):
        self.free = threading.Event()

    def send(self, topic, key, value, headers=None, partition=None):
        pass

    def flush(self):
        self.free.wait(20)


async def test_bound_in_bytes_and_the_deadline_hold_while_the_log_is_stuck():
    producer = StuckProducer()
    writer = LogWriter(producer, 1_000)
    with pytest.raises(DeadlineExceeded, match="same event_ids"):
        await writer.append([record(1, size=500)], Deadline.after_ms(20))
    with pytest.raises(Overloaded, match="1000 bytes"):
        await writer.append([record(2, size=500)], Deadline.after_ms(20))
    before = metrics.IMPRESSIONS.labels("dropped")._value.get()
    items = tuple(SlateItem(item_id=f"item-{i}", item_key=i, score=1.0) for i in range(50))
    Impressions(writer, "impressions", "run").record(
        Query(user_id="u", as_of_us=1), Slate(request_id="r", items=items, tier=Tier.RANK)
    )
    assert metrics.IMPRESSIONS.labels("dropped")._value.get() == before + 1
    assert not writer.close(0.05)
    producer.free.set()
    assert writer.close(5.0)


def test_impression_record_is_keyed_by_user_and_marked_for_stress(log):
    writer = LogWriter(log.producer(), BYTES_MAX)
    slate = Slate(request_id="r", items=(SlateItem(item_id="i", item_key=1, score=0.5),), tier=Tier.POPULAR)
    Impressions(writer, "impressions", "run-1").record(Query(user_id="usér", as_of_us=77, stress=True), slate)
    writer.close(5.0)
    ((key, value, headers),) = stored(log, "impressions")
    message = event_pb2.Impression.FromString(value)
    assert key == "usér".encode()
    assert headers["stress"] == b"1"
    assert (message.stress, message.event_time_us, message.tier, message.run_id) == (True, 77, 5, "run-1")
