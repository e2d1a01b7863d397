"""The way of an event: log, job, features; each once, whatever comes."""

import threading
import time

import numpy as np
import pytest
from double11.v1.event_pb2 import Action, Event, Impression, ImpressionItem

from feature_store import FeatureStatus
from feature_store.online import MemoryStore
from recsys.core import BadInput, Conflict, Deadline, EventBatch, EventKind, ManualClock, VersionMismatch
from streaming.codec import decode_events
from streaming.config import JobConfig
from streaming.dead_letter import Requeued, letters, requeue, survey
from streaming.job import Job
from streaming.log.base import read_all
from streaming.produce import produce

NEVER = Deadline.never()
T = 1_600_000_000_000_000
HOUR, DAY = 3_600_000_000, 86_400_000_000


def world(n: int = 4_000, seed: int = 0) -> EventBatch:
    rng = np.random.default_rng(seed)
    return EventBatch.from_columns(
        {
            "event_id": [f"{seed}-{i}" for i in range(n)],
            "kind": [1] * n,
            "event_type": rng.integers(1, 7, n),
            "event_time": np.sort(T + rng.integers(0, 60 * DAY, n)),
            "user_id": [f"u{u}" for u in rng.zipf(1.5, n) % 50],
            "item_id": [f"i{i}" for i in rng.zipf(1.2, n) % 80],
            "price": rng.integers(1, 9_999, n),
        }
    )


def event(event_id: str, at: int = T, kind: int = 5) -> EventBatch:
    columns = {"kind": [1], "event_type": [kind], "event_time": [at], "user_id": ["u"], "item_id": ["i"]}
    return EventBatch.from_columns({"event_id": [event_id], **columns})


def slate(request_id: str, at: int = T, items: str = "abc", **kw) -> bytes:
    shown = [ImpressionItem(item_id=i, position=p, propensity=0.5) for p, i in enumerate(items, 1)]
    return Impression(request_id=request_id, user_id="u", event_time_us=at, items=shown, **kw).SerializeToString()


async def bought(room) -> float:
    return (await room.store.user("u", T + DAY, NEVER)).values["purchase_count_all"]


def test_steps_get_smaller_when_their_state_gets_large(room):
    events, steps = world(8_000), []
    room.send(*events.chunks(500))
    config = JobConfig(batch_records_max=2_000, step_bytes_max=64 << 10)
    job = Job(room.log, room.store, config, on_step=steps.append)
    job.run(until_caught_up=True)
    job.close()
    assert sum(steps) == 8_000
    assert steps[0] == 2_000
    assert max(steps[1:]) <= 1_024


async def test_streamed_state_equals_the_dataset_folded_offline(room):
    events = world()
    room.config = JobConfig(batch_records_max=700)
    room.send(*events.chunks(500))
    report = room.ingest()
    assert report.events == {"applied": len(events)}
    assert report.steps > 3
    offline = MemoryStore()
    offline.apply(events)
    for kind, ids in (("user", [f"u{i}" for i in range(50)]), ("item", [f"i{i}" for i in range(80)])):
        assert room.store.load(kind, ids) == offline.load(kind, ids)
    assert room.store.max_event_time_us() == offline.max_event_time_us()


async def test_repeats_have_no_effect_in_or_across_batches(room):
    room.send(event("a"), event("a"), event("b"))
    assert room.ingest().events == {"applied": 2, "duplicate": 1}
    room.send(event("a"), event("c"))
    assert room.ingest().events == {"duplicate": 1, "applied": 1}
    assert await bought(room) == 3


async def test_a_second_run_starts_where_the_store_is(room):
    room.send(world(500))
    room.ingest()
    assert room.ingest().records == 0


async def test_late_events_stay_out_and_disordered_ones_do_not(room):
    room.send(event("new", T + 3 * DAY), event("late", T), event("disordered", T + 2 * DAY + HOUR))
    assert room.ingest().events == {"applied": 2, "late": 1}


async def test_a_clock_that_runs_backwards_between_producers_loses_nothing(room):
    for i, at in enumerate([T + HOUR, T, T + 2 * HOUR, T - 5 * HOUR]):
        produce([event(f"e{i}", at)], room.log, clock=ManualClock(T + 3 * HOUR))
    assert room.ingest().events == {"applied": 4}
    user = await room.store.user("u", T + DAY, NEVER)
    assert user.recent_time_us.tolist() == sorted(user.recent_time_us.tolist())
    assert len(user.recent_time_us) == 4


async def test_what_cannot_be_read_is_put_aside_and_the_rest_goes_on(room):
    bad = Event(event_id="bad", event_time_us=T, action=Action(type=2, user_id="u"))
    future = int((time.time() + 3_600) * 1e6)
    ahead = Event(event_id="ahead", event_time_us=future, action=Action(type=2, user_id="u", item_id="i"))
    room.send_bytes(b"\xffnoise")
    room.send_bytes(bad.SerializeToString())
    room.send_bytes(ahead.SerializeToString())
    room.send_bytes(b"", headers={"schema": b"9"})
    room.send_bytes(b"\xff" * 100_000)
    room.send_bytes(slate("r", at=future), topic="impressions")
    room.send(event("good"))
    report = room.ingest()
    assert report.events == {"applied": 1}
    assert report.dead_letters == {"undecodable": 2, "invalid": 1, "future": 2, "unknown-version": 1}
    found = list(letters(room.log, "dead-letter"))
    assert {(m.cause, m.event_id) for m in found if m.event_id} == {
        ("invalid", "bad"), ("future", "ahead"), ("future", "r#1"),
    }  # fmt: skip
    big = next(m for m in found if m.payload_bytes == 100_000)
    assert len(big.payload) == 64 << 10
    assert len(big.payload_sha256) == 32
    assert all(m.topic in ("events", "impressions") and "expected" in m.detail for m in found)


async def test_a_consumers_slow_clock_puts_nothing_aside(room):
    """The log has taken the records: that is what their times are compared with, not when or where they are read."""
    now_us = time.time_ns() // 1_000
    room.send(event("now", now_us))
    job = Job(room.log, room.store, clock=ManualClock(now_us - HOUR))
    report = job.run(until_caught_up=True)
    job.close()
    assert (report.events, report.dead_letters) == ({"applied": 1}, {})


async def test_requeued_dead_letters_keep_their_ids(room):
    ahead = int((time.time() + 3_600) * 1e6)
    value = Event(event_id="x", event_time_us=ahead, action=Action(type=5, user_id="u", item_id="i"))
    room.send_bytes(value.SerializeToString())
    room.send_bytes(b"\xff" * 100_000)
    room.ingest()
    assert requeue(room.log, "dead-letter") == Requeued(sent=1, cut=1, by_cause={"future": 1})
    assert requeue(room.log, "dead-letter", "invalid") == Requeued()
    room.config = JobConfig(future_skew_max_s=86_400)
    assert room.ingest().events == {"applied": 1}
    assert requeue(room.log, "dead-letter", "future") == Requeued(earlier=1)
    assert room.ingest().events == {}
    assert requeue(room.log, "dead-letter", "future", again=True).sent == 1
    assert room.ingest().events == {"duplicate": 1}


async def test_key_headers_and_bytes_come_back_as_they_were(room):
    ahead = int((time.time() + 3_600) * 1e6)
    value = Event(
        event_id="x", event_time_us=ahead, action=Action(type=5, user_id="u", item_id="i")
    ).SerializeToString()
    sent = {"schema": b"1", "trace": b"t" * 100}
    room.send_bytes(value, headers=sent)
    room.send_bytes(value, headers={"schema": b"1", "trace": b"t" * 5_000})
    room.ingest()
    assert requeue(room.log, "dead-letter").sent == 2
    records = [r for b in read_all(room.log, "events") for r in zip(b.keys, b.values, b.headers, strict=True)]
    assert [(k, v, dict(h)) for k, v, h in records[2:]] == [(b"u", value, sent), (b"u", value, {"schema": b"1"})]


async def test_letters_that_came_after_a_requeue_wait_by_cause(room):
    ahead = int((time.time() + 3_600) * 1e6)
    value = Event(event_id="x", event_time_us=ahead, action=Action(type=5, user_id="u", item_id="i"))
    for some in range(3):
        room.send_bytes(value.SerializeToString())
        room.send_bytes(b"\xff")
        room.ingest()
        found = survey(room.log, "dead-letter", limit=2)
        assert found.waiting == {"future": 1, "undecodable": some + 1}
        assert [m.requeued for m in found.newest] == [False, False]
        assert requeue(room.log, "dead-letter", "future").sent == 1
        read_back = room.ingest().dead_letters
        assert read_back == {"future": 1}  # still ahead: a letter of its own
        assert requeue(room.log, "dead-letter", "future").sent == 1
        assert room.ingest().dead_letters == {"future": 1}
        assert requeue(room.log, "dead-letter", "future").sent == 1
        room.config = JobConfig(future_skew_max_s=86_400)
        assert room.ingest().events == {"applied" if some == 0 else "duplicate": 1}
        room.config = JobConfig()
    assert requeue(room.log, "dead-letter") == Requeued(sent=3, earlier=9, by_cause={"undecodable": 3})


async def test_a_version_that_is_still_unknown_is_put_aside_again(room):
    value = Event(event_id="x", event_time_us=T, action=Action(type=5, user_id="u", item_id="i"))
    room.send_bytes(value.SerializeToString(), headers={"schema": b"9"})
    for _ in range(2):
        assert room.ingest().dead_letters == {"unknown-version": 1}
        assert requeue(room.log, "dead-letter", "unknown-version").sent == 1
    assert room.ingest().events == {}


async def test_slates_count_once_and_are_no_touch(room):
    for request, slate_id in (("r1", ""), ("r1", ""), ("r2", "s1"), ("r2", "s2"), ("r2", "s2")):
        room.send_bytes(slate(request, slate_id=slate_id), topic="impressions")
    assert room.ingest().events == {"applied": 9, "duplicate": 6}
    user = await room.store.user("u", T + 1, NEVER)
    assert user.values["impression_count_all"] == 9
    assert not len(user.recent_item_key)
    assert not len(user.pair_item_key)
    assert (await room.store.items(["a"], T + 1, NEVER)).column("impression_count_all")[0] == 3


async def test_slates_are_not_late_because_actions_were_read_first(room):
    room.send(event("a", T + 9 * DAY))
    room.send_bytes(slate("r", at=T), topic="impressions")
    assert room.ingest().events == {"applied": 4}


async def test_stress_traffic_writes_shadow_state_only(room):
    real, marked = event("a").table, event("s").table.to_pydict() | {"stress": [True]}
    room.send(EventBatch(real), EventBatch.from_columns(marked))
    room.send_bytes(slate("r", stress=True), topic="impressions")
    assert room.ingest().events == {"applied": 5}
    assert await bought(room) == 1
    assert room.store.load("user", ["u"], shadow=True) != [b""]
    assert (await room.store.items(["a"], T + 1, NEVER)).status[0, 0] == FeatureStatus.NOT_FOUND


async def test_forget_is_an_event_and_stays(room):
    forget = {"event_id": ["f"], "kind": [int(EventKind.FORGET)], "event_time": [T + 10], "user_id": ["u"]}
    room.send(event("a"), EventBatch.from_columns(forget), event("after", T + 20))
    room.ingest()
    room.send(event("older", T + 5))
    room.send_bytes(slate("r", at=T + 1), topic="impressions")
    report = room.ingest()
    assert report.events == {"forgotten": 4}
    user = await room.store.user("u", T + DAY, NEVER)
    assert user.recent_time_us.tolist() == [T + 20]


async def test_catalogue_changes_reach_items(room):
    changes = EventBatch.from_columns(
        {
            "event_id": ["1", "2", "3"],
            "kind": [int(EventKind.ITEM), int(EventKind.STOCK), int(EventKind.PRICE)],
            "event_time": [T, T + 2, T + 1],
            "item_id": ["i"] * 3,
            "listed": [True, None, None],
            "price": [500, None, 400],
            "stock": [None, 0, None],
        }
    )
    room.send(changes)
    room.ingest()
    found = await room.store.items(["i"], T + HOUR, NEVER)
    assert (found.column("price")[0], found.column("stock")[0], found.column("listed")[0]) == (400, 0, 1)


async def test_stop_ends_after_the_step_and_the_next_run_goes_on(room):
    room.send(world())
    stop = threading.Event()
    job = Job(room.log, room.store, JobConfig(batch_records_max=300), on_step=lambda _: stop.set())
    assert job.run(stop=stop).steps == 1
    job.close()
    assert room.ingest().events["applied"] + job.report.events["applied"] == 4_000


def test_a_writer_that_was_overtaken_is_fenced(room):
    room.send(world(100))
    zombie = Job(room.log, room.store)
    room.ingest()
    with pytest.raises(Conflict, match="Another writer"):
        zombie.step()


def test_an_offset_below_the_logs_start_is_refused(room, monkeypatch):
    monkeypatch.setattr(type(room.log), "begin_offsets", lambda self, topic: dict.fromkeys(range(4), 7))
    with pytest.raises(VersionMismatch, match="features materialize"):
        Job(room.log, room.store)


@pytest.mark.parametrize(("kind", "column"), [(EventKind.PRICE, "price"), (EventKind.STOCK, "stock")])
def test_a_change_without_its_number_is_refused_and_not_sent_as_0(room, kind, column):
    columns = {"event_id": ["a", "b"], "kind": [int(kind)] * 2, "event_time": [T, T + 1], "item_id": ["i", "j"]}
    changes = EventBatch.from_columns(columns | {column: [5, None]})
    with pytest.raises(BadInput, match=f"event b: got a {column} change of item j without a {column}"):
        room.send(changes)
    found = [decode_events(b.values).batch for b in read_all(room.log, "catalog")]
    assert [(b.strings("item_id"), b.numpy(column).tolist()) for b in found] == [(["i"], [5])]


def test_a_dataset_dated_in_the_future_is_not_produced(room):
    with pytest.raises(BadInput, match="--shift-to"):
        produce([event("a", T + HOUR)], room.log, clock=ManualClock(T))
    assert produce([event("a", T + HOUR)], room.log, clock=ManualClock(T), shift_us=-HOUR).events == 1
    with pytest.raises(BadInput, match="future"):
        produce([event("b"), event("c", T + HOUR)], room.log, clock=ManualClock(T))
    assert sum(room.log.end_offsets("events").values()) == 2  # what was sent before it is not dropped
