"""Records of item-updates: columns there and back, cut to size, taken once."""

import numpy as np
import pytest
from double11.v1.item_pb2 import ItemUpdates, ItemUpdatesSource
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.columns import EventColumns
from recsys.core import EventBatch
from recsys.core.murmur2 import partition_of
from streaming.item_updates import ItemRows, SourceRows, encode_updates

T = 1_600_000_000_000_000
SOURCES = [("events", 0), ("impressions", 0), ("events", 2)]


def some(n: int, seed: int = 0, items: int = 20) -> tuple[EventColumns, SourceRows]:
    """N events of three sources, several of a slate with the same offset."""
    rng = np.random.default_rng(seed)
    kind = rng.choice([1, 1, 1, 2, 3], n)
    batch = EventBatch.from_columns(
        {
            "event_id": [f"e{i}" for i in range(n)],
            "kind": kind,
            "event_type": np.where(kind == 1, rng.integers(1, 7, n), 0),
            "event_time": T + rng.integers(0, 10**9, n),
            "user_id": [f"u{i % 7}" if k == 1 else None for i, k in enumerate(kind)],
            "item_id": [f"商品{i}" for i in rng.integers(0, items, n)],
            "price": [int(p) if k != 3 else None for k, p in zip(kind, rng.integers(1, 99, n), strict=True)],
            "stock": [4 if k == 3 else None for k in kind],
            "quantity": [1 + i % 3 if k == 1 and i % 2 else None for i, k in enumerate(kind)],
        }
    )
    source, offset = np.sort(rng.integers(0, 3, n)), np.zeros(n, np.int64)
    for s in range(3):
        mine = source == s
        offset[mine] = np.sort(rng.integers(0, max(int(mine.sum()), 1), int(mine.sum())))
    rows = SourceRows(sources=SOURCES, source=source, offset=offset, stress=rng.random(n) < 0.2)
    return EventColumns.of(batch), rows


def rows_of(events: EventColumns, stress) -> list[tuple]:
    """Events in an order that does not depend on how they came."""
    names = ("kind", "event_type", "time_us", "event_key", "price", "quantity", "stock", "listed", "category", "brand")
    columns = [getattr(events, n).tolist() for n in names]
    ids = [events.item_ids[i] for i in events.item_code.tolist()]
    return sorted(zip(ids, np.asarray(stress).tolist(), events.is_action.tolist(), *columns, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 300), st.integers(0, 1_000), st.integers(1, 5), st.sampled_from([300, 2_000, 900 << 10]))
def test_what_is_sent_arrives_once_however_often_it_is_sent(n, seed, num_partitions, bytes_max):
    events, rows = some(n, seed)
    rounds = list(encode_updates("here", events, rows, num_partitions, bytes_max=bytes_max))
    found, marks = ItemRows(), {q: {} for q in range(num_partitions)}
    for again in (rounds, rounds[:1], rounds):
        for records in again:
            assert len({q for q, _ in records}) == len(records), "one record for a partition in a round"
            for q, value in records:
                found.add_record(value, "here", marks[q])
                assert all(
                    partition_of(i.encode(), num_partitions) == q for i in ItemUpdates.FromString(value).item_ids
                )
    assert rows_of(*found.events()) == rows_of(events, rows.stress)


def test_rows_of_one_source_record_are_never_parted():
    events, rows = some(400, items=1)
    pieces = [value for records in encode_updates("here", events, rows, 1, bytes_max=500) for _, value in records]
    assert len(pieces) > 20
    seen: set[tuple] = set()
    for message in map(ItemUpdates.FromString, pieces):
        offset, mine, at = np.frombuffer(message.source_offset, "<i8"), set(), 0
        for s in message.sources:
            mine |= {(s.topic, s.partition, int(o)) for o in offset[at : at + s.rows]}
            at += s.rows
        assert not mine & seen
        seen |= mine


def test_a_step_cut_otherwise_is_taken_up_where_the_marks_are():
    events, rows = some(200, 3)
    early = rows.offset < 20
    first = list(encode_updates("here", events.where(early), part(rows, early), 2))
    whole = list(encode_updates("here", events, rows, 2))
    found, marks = ItemRows(), {0: {}, 1: {}}
    for q, value in [r for rounds in (first, whole) for records in rounds for r in records]:
        found.add_record(value, "here", marks[q])
    assert rows_of(*found.events()) == rows_of(events, rows.stress)


def test_another_namespace_is_left_out():
    (records,) = encode_updates("there", *some(10), 1)
    found, marks = ItemRows(), {}
    found.add_record(records[0][1], "here", marks)
    assert marks == {}
    assert len(found.events()[0]) == 0


BROKEN = {
    "no protobuf": b"\xff\xff",
    "a column too short": ItemUpdates(namespace="here", kind=b"\1", action_type=b"\2").SerializeToString(),
    "an item out of range": ItemUpdates(
        namespace="here",
        sources=[ItemUpdatesSource(topic="events", rows=1)],
        item=bytes(8),
        source_offset=bytes(8),
        event_time_us=bytes(8),
        event_key=bytes(8),
        kind=b"\1",
        action_type=b"\2",
    ).SerializeToString(),
    "rows of no source": ItemUpdates(
        namespace="here",
        item_ids=["i"],
        item=bytes(8),
        source_offset=bytes(8),
        event_time_us=bytes(8),
        event_key=bytes(8),
        kind=b"\1",
        action_type=b"\2",
    ).SerializeToString(),
}


@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_record_changes_nothing(value):
    found, marks = ItemRows(), {("events", 0): 3}
    with pytest.raises(ValueError, match="expected"):
        found.add_record(value, "here", marks)
    assert marks == {("events", 0): 3}
    assert len(found.events()[0]) == 0


def part(rows: SourceRows, keep) -> SourceRows:
    return SourceRows(
        sources=rows.sources, source=rows.source[keep], offset=rows.offset[keep], stress=rows.stress[keep]
    )
