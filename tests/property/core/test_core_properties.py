"""Properties of the shared nouns over inputs nobody thought of."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.core import Candidates, Deadline, EventBatch, WallClock, key, keys
from recsys.core.ids import find_rows, unique_by_key
from recsys.core.items import ItemTable

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(text))
def test_keys_are_non_negative_and_agree_one_by_one(names: list[str]) -> None:
    got = keys(names)
    assert got.dtype == np.int64
    assert (got >= 0).all()
    assert got.tolist() == [key(n) for n in names]


@given(st.lists(text))
def test_unique_by_key_keeps_the_first_of_each(names: list[str]) -> None:
    kept, kept_keys, rejected = unique_by_key(names)
    assert kept == list(dict.fromkeys(names))
    assert kept_keys.tolist() == [key(n) for n in kept]
    assert rejected == []


@given(st.lists(st.integers(0, 9), unique=True), st.lists(st.integers(-1, 10)))
def test_find_rows_is_a_dictionary_of_places(present: list[int], wanted: list[int]) -> None:
    key_M, order_M = np.array(present, np.int64), np.argsort(np.array(present, np.int64))
    place = {k: i for i, k in enumerate(sorted(present))}
    row = {k: i for i, k in enumerate(present)}
    asked = np.array(wanted, np.int64)
    assert find_rows(key_M[order_M], asked).tolist() == [place.get(k, -1) for k in wanted]
    assert find_rows(key_M[order_M], asked, order_M).tolist() == [row.get(k, -1) for k in wanted]


@given(st.lists(st.integers(0, 2**62), min_size=1))
def test_wall_clock_is_monotone_whatever_the_machine_says(readings_ns: list[int]) -> None:
    source = iter(readings_ns)
    clock = WallClock(lambda: next(source))
    given_us = [clock.now_us() for _ in readings_ns]
    assert given_us == sorted(given_us)
    assert given_us[-1] == max(readings_ns) // 1000


@given(st.floats(-1e6, 1e9), st.floats(0, 1e9))
def test_capping_never_extends_a_deadline(left_ms: float, cap_ms: float) -> None:
    deadline = Deadline.after_ms(left_ms)
    assert deadline.capped(cap_ms).at_s <= deadline.at_s
    assert not math.isinf(Deadline.never().capped(cap_ms).at_s)


@given(st.integers(0, 40), st.integers(1, 50))
def test_chunks_put_together_are_the_batch(rows: int, rows_max: int) -> None:
    ids = [str(i) for i in range(rows)]
    batch = (
        EventBatch.from_columns({"event_id": ids, "kind": [1] * rows, "event_time": list(range(rows))})
        if rows
        else EventBatch.empty()
    )
    chunks = list(batch.chunks(rows_max))
    assert all(0 < len(c) <= rows_max for c in chunks)
    assert EventBatch.concat(chunks).table.equals(batch.table)


@given(st.sets(text, max_size=30), st.lists(text, max_size=10))
def test_item_table_rows_point_at_their_own_item(names: set[str], asked: list[str]) -> None:
    import pyarrow as pa

    table = ItemTable.from_table(
        pa.table({"item_id": pa.array(list(names), pa.string()), "item_key": pa.array(keys(names), pa.int64())})
    )
    assert table.ids(keys(asked)) == [n if n in names else None for n in asked]


@given(st.lists(st.integers(0, 2**62), unique=True, max_size=20), st.data())
def test_take_keeps_columns_together(item_keys: list[int], data: st.DataObject) -> None:
    n = len(item_keys)
    found = Candidates.from_source("s", np.array(item_keys, np.int64), np.arange(n, dtype=np.float32))
    rows = data.draw(st.lists(st.integers(0, n - 1), max_size=20)) if n else []
    taken = found.take(np.array(rows, np.int64))
    assert taken.item_key.tolist() == [item_keys[r] for r in rows]
    assert taken.score("s").tolist() == [float(r) for r in rows]
