"""The reducer against a plain Python reading of what a table declares."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feature_store.columns import NewRows
from feature_store.fold import merge
from feature_store.state import Op, Rows, State, Table, decode, encode

GROUPS, SHIFT = 3, 4
row = st.tuples(st.integers(0, GROUPS * 16 - 1), st.integers(0, 2), *[st.integers(0, 300)] * 3)
batches = st.lists(st.lists(st.tuples(st.integers(0, 2), row), max_size=25), min_size=1, max_size=4)
bounds = st.one_of(st.none(), st.tuples(*[st.integers(0, 6)] * GROUPS))


def table_of(keep, span) -> Table:
    values = (("a", Op.ADD), ("b", Op.MAX), ("c", Op.MIN))
    codes = ("u1", "u2", "u1", "2u1", "u7")
    return Table(name="t", key=("k", "l"), values=values, keep=keep, span=span, group_shift=SHIFT, codes=codes)


def plainly(table: Table, kept: dict, batch: list) -> dict:
    """One entity: key -> values, after one batch."""
    kept = dict(kept)
    for k, m, *v in batch:
        a, b, c = kept.get((k, m), (0, -1, 1 << 60))
        kept[k, m] = (a + v[0], max(b, v[1]), min(c, v[2]))
    for group in range(GROUPS) if batch else ():
        mine = sorted(key for key in kept if key[0] >> SHIFT == group)
        stay = mine
        if table.span is not None and mine:
            stay = [key for key in stay if key[0] > mine[-1][0] - table.span[group]]
        if table.keep is not None:
            stay = [key for key in stay if mine.index(key) >= len(mine) - table.keep[group]]
        for key in set(mine) - set(stay):
            del kept[key]
    return kept


@given(batches, bounds, bounds)
def test_merging_batches_keeps_what_is_declared_and_blobs_keep_it_all(batches, keep, span):
    table = table_of(keep, span)
    rows, expected = Rows.empty(table, 3), [{}, {}, {}]
    for batch in batches:
        words = np.array([r for _, r in batch], np.int64).reshape(-1, 5)
        rows = merge(rows, NewRows(np.array([e for e, _ in batch], np.int64), words))
        expected = [plainly(table, expected[e], [r for owner, r in batch if owner == e]) for e in range(3)]
        blobs = encode(State({"t": rows}))
        rows = decode([table], blobs)["t"]
        found = [rows.words[a:b].tolist() for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
        assert found == [[[*k, *v] for k, v in sorted(one.items())] for one in expected]
        assert [not blob for blob in blobs] == [not one for one in expected]
