"""State is a function of the set of events: any order and any batching give bit-equal blobs."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.commit import Commit
from feature_store.online import MemoryStore
from feature_store.state import Op, Rows, State, Table, decode, encode
from feature_store.update import archived_updates
from feature_store.views import ITEM, USER
from recsys.core import EventBatch, EventKind

DAY = 86_400_000_000


def world(seed: int, n: int) -> EventBatch:
    rng = np.random.default_rng(seed)
    kind = rng.choice([1, 1, 1, 1, 2, 3, 4], n)
    is_action = kind == EventKind.ACTION
    price = rng.integers(0, 10_000, n)
    return EventBatch.from_columns(
        {
            "event_id": [f"{seed}-{i}" for i in range(n)],
            "kind": kind,
            "event_type": np.where(is_action, rng.integers(1, 7, n), 0),
            # Few distinct times, so that ties are common; months, so that buckets fall out of their tables.
            "event_time": 19_000 * DAY + rng.integers(0, 400, n) * (DAY // 3),
            "user_id": [f"u{u}" if a else None for u, a in zip(rng.integers(0, 3, n), is_action, strict=True)],
            "item_id": [f"i{i}" for i in rng.integers(0, 600, n)],
            "price": [int(p) if k in (1, 2, 4) else None for p, k in zip(price, kind, strict=True)],
            "stock": [int(p) if k == EventKind.STOCK else None for p, k in zip(price, kind, strict=True)],
            "listed": [bool(p % 2) if k == EventKind.ITEM else None for p, k in zip(price, kind, strict=True)],
            "category": [f"c{p % 5}" for p in price],
        }
    )


def blobs(batches: list[EventBatch]) -> dict[str, list[bytes]]:
    store = MemoryStore()
    for batch in batches:
        updates, _ = archived_updates(store.load, batch)
        store.commit(Commit(updates=updates))
    users, items = [f"u{u}" for u in range(3)], [f"i{i}" for i in range(600)]
    return {"user": store.load("user", users), "item": store.load("item", items)}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4_000), st.lists(st.integers(0, 4_000), max_size=6))
def test_any_order_and_any_batching_give_bit_equal_state(seed, n, cuts):
    events = world(seed, n)
    whole = blobs([events])
    shuffled = events.take(np.random.default_rng(seed + 1).permutation(n))
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    parts = [shuffled.slice(a, b - a) for a, b in itertools.pairwise(edges) if b > a]
    assert blobs(parts) == whole


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 2**62), max_size=5)] * 2), min_size=1, max_size=6))
def test_encode_and_decode_are_inverse(entities):
    tables = (Table(name="a", key=("k",)), Table(name="b", key=("k",), values=(("v", Op.ADD),)))
    rows = {}
    for t, table in enumerate(tables):
        lists = [sorted(e[t]) for e in entities]
        words = [[v] * table.width for values in lists for v in values]
        offsets = np.cumsum([0, *map(len, lists)])
        rows[table.name] = Rows(table, offsets, np.array(words, np.int64).reshape(-1, table.width))
    back = decode(tables, encode(State(rows)))
    for name in rows:
        np.testing.assert_array_equal(back[name].words, rows[name].words)
        np.testing.assert_array_equal(back[name].offsets, rows[name].offsets)


CODES = {"u1": 8, "u2": 16, "u4": 32, "u5": 40, "u6": 48, "u7": 56, "u8": 63}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_values_that_do_not_fit_their_bytes_are_kept_all_the_same(data):
    codes = data.draw(st.lists(st.sampled_from(list(CODES)), min_size=1, max_size=5))
    lanes = data.draw(st.sampled_from(["2u1", "2u2"]))
    count = st.one_of(st.integers(0, 255), st.integers(0, 2**31 - 1))
    # Mostly values that fit, so that narrow and wide entities are decoded beside each other.
    columns = [
        st.one_of(st.integers(0, 2 ** CODES[c] - 1), *[st.integers(0, 2**63 - 1)] * (i == 1))
        for i, c in enumerate(codes)
    ]
    columns += [st.builds(lambda a, b: a | b << 32, count, count)] * 3
    table = Table(name="t", key=tuple(f"c{i}" for i in range(len(columns))), codes=(*codes, lanes, lanes, lanes))
    entities = data.draw(st.lists(st.lists(st.tuples(*columns), max_size=4), min_size=1, max_size=6))
    words = np.array([row for rows in entities for row in rows], np.int64).reshape(-1, table.width)
    rows = Rows(table, np.cumsum([0, *map(len, entities)]), words)
    blobs = encode(State({"t": rows}))
    back = decode((table,), blobs)["t"]
    np.testing.assert_array_equal(back.words, words)
    np.testing.assert_array_equal(back.offsets, rows.offsets)
    alone = [decode((table,), [b])["t"].words for b in blobs]
    np.testing.assert_array_equal(np.concatenate(alone), words)


def test_tables_stay_within_their_bounds():
    events = world(7, 30_000)
    found = blobs([events])
    for views in (USER, ITEM):
        state = decode(views.tables, found[views.kind])
        for table in views.tables:
            rows, bound = state[table.name], table.keep or table.span
            if bound is None:
                continue
            group = rows.words[:, 0] >> table.group_shift
            _, counts = np.unique(np.stack([rows.owner, group]), axis=1, return_counts=True)
            assert counts.max(initial=0) <= max(bound)
