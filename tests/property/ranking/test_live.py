"""The live catalogue is a function of the set of events: order, batches and repeats do not matter."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import EventBatch, EventKind, keys
from recsys.core.items import ItemTable
from recsys.ranking.live import Applied, LiveCatalogue

NUM_ITEMS = 4
ids = [f"item-{i}" for i in range(NUM_ITEMS)]
ITEMS = ItemTable.from_table(pa.table({"item_id": ids, "item_key": keys(ids)}))
KEYS = keys([*ids, "ghost"])
changes = st.lists(
    st.tuples(
        st.integers(0, NUM_ITEMS),  # the last one is unknown to the run
        st.sampled_from([EventKind.PRICE, EventKind.STOCK, EventKind.ITEM]),
        st.integers(1, 5),  # event time: ties are common
        st.integers(0, 30),  # event id
        st.integers(0, 3),
    ),
    max_size=30,
    unique_by=lambda c: (c[3], c[1]),
)


def batch(rows) -> EventBatch:
    def of(kind, value):
        return pa.array([value(r[4]) if r[1] == kind else None for r in rows])

    return EventBatch.from_columns(
        {
            "event_id": [f"e{r[3]}" for r in rows],
            "kind": np.array([r[1] for r in rows], np.int8),
            "event_time": np.array([r[2] for r in rows], np.int64),
            "item_id": [f"item-{r[0]}" if r[0] < NUM_ITEMS else "ghost" for r in rows],
            "price": of(EventKind.PRICE, int).cast(pa.int64()),
            "stock": of(EventKind.STOCK, int).cast(pa.int64()),
            "listed": of(EventKind.ITEM, lambda v: v > 0).cast(pa.bool_()),
        }
    )


def oracle(rows):
    """(available, price) per item, by sorting."""
    latest = {}
    for item, kind, _, _, value in sorted(rows, key=lambda r: (r[2], int(keys([f"e{r[3]}"])[0]), r[4])):
        if item < NUM_ITEMS:
            latest[item, kind] = value
    shown = [latest.get((i, EventKind.STOCK), 1) != 0 and latest.get((i, EventKind.ITEM), 1) != 0 for i in range(5)]
    return shown, [latest.get((i, EventKind.PRICE), -1) for i in range(5)]


@given(changes, st.randoms(use_true_random=False), st.integers(1, 7))
@settings(deadline=None)
def test_order_batches_and_repeats_do_not_matter(rows, random, size):
    arrival = rows + random.sample(rows, len(rows) // 2)
    random.shuffle(arrival)
    live = LiveCatalogue(ITEMS)
    for start in range(0, len(arrival), size):
        part = arrival[start : start + size]
        told = live.apply(batch(part))
        assert told.applied + told.superseded + told.unknown == len(part)
        assert told.unknown == sum(r[0] == NUM_ITEMS for r in part)
    shown, price = oracle(rows)
    assert live.available(KEYS).tolist() == shown
    assert live.price(KEYS).tolist() == price
    assert live.num_unavailable() == shown.count(False)
    if arrival:
        repeat = live.apply(batch(arrival))
        assert repeat.applied == 0


def test_nothing_in_nothing_out():
    live = LiveCatalogue(ITEMS)
    assert live.apply(EventBatch.empty()) == Applied()
    assert live.available(KEYS).all()
    assert not live.says_stock(KEYS).any()
    assert not live.says_listed(KEYS).any()
