"""The live catalogue is a function of the set of events, also of new items: order, batches, repeats do not matter."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core import EventBatch, EventKind, keys
from recsys.core.attributes import Where
from recsys.core.items import ItemTable
from recsys.ranking.catalogue import Catalogue
from recsys.ranking.live import Applied, LiveCatalogue
from recsys.ranking.told import LISTED

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


NEW_IDS = [f"new-{i}" for i in range(12)]
changes_of_new = st.lists(
    st.tuples(
        st.integers(0, len(NEW_IDS) - 1),
        st.sampled_from([EventKind.PRICE, EventKind.STOCK, EventKind.ITEM, EventKind.ITEM]),
        st.integers(1, 4),
        st.integers(0, 200),
        st.integers(0, 3),
    ),
    max_size=80,
    unique_by=lambda c: (c[3], c[1]),
)


def batch(rows, names=(*ids, "ghost")) -> EventBatch:
    def of(kind, value):
        return pa.array([value(r[4]) if r[1] == kind else None for r in rows])

    return EventBatch.from_columns(
        {
            "event_id": [f"e{r[3]}" for r in rows],
            "kind": np.array([r[1] for r in rows], np.int8),
            "event_time": np.array([r[2] for r in rows], np.int64),
            "item_id": [names[r[0]] for r in rows],
            "price": of(EventKind.PRICE, int).cast(pa.int64()),
            "stock": of(EventKind.STOCK, int).cast(pa.int64()),
            "listed": of(EventKind.ITEM, lambda v: v > 0).cast(pa.bool_()),
        }
    )


def oracle(rows):
    """(available, price) per item, by sorting."""
    latest = {}
    for item, kind, _, _, value in sorted(rows, key=lambda r: (r[2], int(keys([f"e{r[3]}"])[0]), r[4])):
        latest[item, kind] = value
    told = {i for i, _ in latest}
    shown = [
        latest.get((i, EventKind.STOCK), 1) != 0
        and latest.get((i, EventKind.ITEM), int(i < NUM_ITEMS or i not in told)) != 0
        for i in range(NUM_ITEMS + 1)
    ]
    return shown, [latest.get((i, EventKind.PRICE), -1) for i in range(NUM_ITEMS + 1)]


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
        assert told.unknown == 0
    shown, price = oracle(rows)
    assert live.available(KEYS).tolist() == shown
    assert live.price(KEYS).tolist() == price
    ghost = [r for r in rows if r[0] == NUM_ITEMS and r[1] == EventKind.ITEM]
    new_listed = sorted(ghost, key=lambda r: (r[2], int(keys([f"e{r[3]}"])[0]), r[4]))
    assert live.listed(KEYS).tolist() == [True] * NUM_ITEMS + [bool(new_listed) and new_listed[-1][4] > 0]
    assert live.new_items().tolist() == ([KEYS[-1]] if live.listed(KEYS)[-1] and shown[-1] else [])
    assert live.num_unavailable() == shown[:-1].count(False) + bool(new_listed and not shown[-1])
    if arrival:
        repeat = live.apply(batch(arrival))
        assert repeat.applied == 0


def newest_first(live):
    """New items by their definition: all that is known, looked at and sorted."""
    table = live.arrivals.table()
    item_key = np.fromiter(table.row_by_key, np.int64)
    row = table.rows(item_key)
    here = table.told.available[row]
    return item_key[here][np.lexsort((item_key[here], -table.told.time_us(LISTED)[row[here]]))].tolist()


@given(changes_of_new, st.integers(1, 7), st.integers(1, len(NEW_IDS)), st.integers(0, len(NEW_IDS)))
@settings(deadline=None)
def test_new_items_are_in_order_after_every_batch(rows, size, new_items_max, limit):
    live = LiveCatalogue(ITEMS, new_items_max)
    for start in range(0, len(rows), size):
        live.apply(batch(rows[start : start + size], NEW_IDS))
        assert live.new_items().tolist() == newest_first(live)
        assert live.new_items(limit).tolist() == newest_first(live)[:limit]
    again = LiveCatalogue(ITEMS, new_items_max)
    again.restore(live.capture())
    assert again.new_items().tolist() == newest_first(live)


def test_nothing_in_nothing_out():
    live = LiveCatalogue(ITEMS)
    assert live.apply(EventBatch.empty()) == Applied()
    assert live.available(KEYS).all()
    assert not live.says_stock(KEYS).any()
    assert not live.says_listed(KEYS).any()


def listing(item_id, listed=True, at=1, **names) -> EventBatch:
    return EventBatch.from_columns(
        {
            "event_id": [f"{item_id}-{at}"],
            "kind": np.array([EventKind.ITEM], np.int8),
            "event_time": np.array([at]),
            "item_id": [item_id],
            "listed": [listed],
            "price": pa.array([names.pop("price", None)], pa.int64()),
            **{name: [text] for name, text in names.items()},
        }
    )


def test_a_new_item_has_a_name_and_attributes_once_it_is_listed():
    live = LiveCatalogue(ITEMS)
    catalogue = Catalogue(ITEMS, live)
    new = keys(["tea"])
    assert not catalogue.known(new).any()
    live.apply(listing("tea", title="Green tea", category="drinks", brand="Long", price=250))
    assert catalogue.known(new).all()
    assert [catalogue.values(n, new) for n in ("item_id", "title", "category", "brand")] == [
        ["tea"], ["Green tea"], ["drinks"], ["Long"],
    ]  # fmt: skip
    assert catalogue.price(new).tolist() == [250]
    assert catalogue.category(new)[0] >= 0
    assert catalogue.admits(Where(categories=frozenset({"drinks"}), price_max_minor=250), new).all()
    assert not catalogue.admits(Where(deny_brands=frozenset({"Long"})), new).any()
    live.apply(listing("tea", at=2, category="teas"))  # what a listing leaves out stays
    assert catalogue.values("title", new) == ["Green tea"]
    assert catalogue.matching(Where(categories=frozenset({"teas"}))).tolist() == new.tolist()
    live.apply(listing("tea", listed=False, at=3))
    assert not len(live.new_items())


def test_new_items_are_bounded_and_delisted_ones_make_room():
    live = LiveCatalogue(ITEMS, new_items_max=32)
    for i in range(40):
        assert live.apply(listing(f"n{i}", at=i)).unknown == int(i >= 32)
    assert len(live.new_items()) == 32
    assert live.new_items()[0] == keys(["n31"])[0]
    for i in range(4):
        live.apply(listing(f"n{i}", listed=False, at=100 + i))
    for i in range(50, 60):
        assert live.apply(listing(f"n{i}", at=i)).unknown == int(i >= 54)
    assert set(live.new_items()) == set(keys([f"n{i}" for i in (*range(4, 32), *range(50, 54))]))
    assert live.listed(keys(["n0", "n53"])).tolist() == [False, True]


class Untouchable(dict):
    """Nobody is to look through all keys of a table, or for one of them."""

    def _no(self, *args):
        raise AssertionError("looked at")

    get = copy = keys = items = __getitem__ = __iter__ = _no


def test_new_items_cost_what_is_asked_for_and_what_has_changed():
    live = LiveCatalogue(ITEMS, new_items_max=32)
    for i in range(32):
        live.apply(listing(f"n{i}", at=i))
    table = live.arrivals.table()
    order, row_by_key = table.newest, table.row_by_key
    table.row_by_key = Untouchable()
    assert live.new_items(3).tolist() == keys(["n31", "n30", "n29"]).tolist()
    assert table.newest is order  # made by whoever changes it, not by whoever asks
    table.row_by_key = row_by_key
    live.apply(batch([(0, EventKind.PRICE, 50, 1, 7)], ["n4"]))
    assert table.newest is order
    assert live.apply(batch([(0, EventKind.PRICE, 50, 2, 7)], ["unseen"])).unknown == 1
    assert live.arrivals.table() is table  # full and nothing to sweep: nothing is copied
    live.apply(listing("n4", at=60))
    assert live.new_items(2).tolist() == keys(["n4", "n31"]).tolist()
