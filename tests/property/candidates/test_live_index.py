"""Whatever is written in whatever order, a live index at exact settings answers as a dictionary searched whole."""

import numpy as np
import pytest
import vectors_world as world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.candidates.nearest import static
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.rows import RowSet
from recsys.candidates.nearest.static import AnnIndex
from recsys.core.attributes import Attributes, Where
from recsys.models.config import IndexConfig, LiveIndexConfig

DIM, NUM_KEYS = 4, 24
CATEGORIES = ("tea", "hats", None)
KEYS = world.keys(NUM_KEYS)
VECTORS = np.random.default_rng(0).normal(size=(200, DIM)).astype(np.float32)

item = st.integers(0, NUM_KEYS - 1)
step = st.one_of(
    st.tuples(st.just("upsert"), st.lists(st.tuples(item, st.integers(0, 199), st.integers(0, 2)), max_size=4)),
    st.tuples(st.just("delete"), st.lists(item, max_size=3)),
    st.tuples(st.just("stock"), item, st.integers(0, 2)),
    st.tuples(st.just("price"), item, st.integers(0, 5)),
    st.tuples(st.just("rebuild"), st.booleans()),
)
filters = st.builds(
    Where,
    categories=st.none() | st.frozensets(st.sampled_from(["tea", "hats"]), min_size=1),
    price_min_minor=st.none() | st.integers(0, 5),
    price_max_minor=st.none() | st.integers(0, 5),
    allow=st.none() | st.lists(item, max_size=10).map(lambda some: KEYS[some]),
    sold_out=st.booleans(),
)


def apply(index, oracle, what):
    name, *args = what
    if name == "upsert":
        rows = args[0]
        keys = KEYS[[i for i, _, _ in rows]] if rows else KEYS[:0]
        names = [CATEGORIES[c] for _, _, c in rows]
        index.upsert(keys, VECTORS[[v for _, v, _ in rows]].reshape(-1, DIM), Attributes.of(len(rows), category=names))
        for (_, v, c), key in zip(rows, keys.tolist(), strict=True):
            oracle.items[key] = VECTORS[v], CATEGORIES[c], -1, -1
    elif name == "delete":
        gone = {int(KEYS[i]) for i in args[0]}
        assert index.delete(KEYS[args[0]] if args[0] else KEYS[:0]) == len(gone & set(oracle.items))
        for key in gone:
            oracle.items.pop(key, None)
    elif name == "rebuild":
        index.rebuild(retrain=args[0])
    else:
        key = int(KEYS[args[0]])
        column = "stock_units" if name == "stock" else "price_minor"
        known = index.update(np.array([key]), **{column: np.array([args[1]])})
        assert known == (key in oracle.items)
        if known:
            vector, category, price, stock = oracle.items[key]
            changed = (price, args[1]) if name == "stock" else (args[1], stock)
            oracle.items[key] = vector, category, *changed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    start=st.integers(0, NUM_KEYS),
    steps=st.lists(st.tuples(step, filters), max_size=12),
    kind=st.sampled_from(["flat", "ivf"]),
)
def test_it_answers_as_the_oracle_after_every_step(start, steps, kind):
    config = IndexConfig(kind=kind, exact_items_max=1_000)
    live = LiveIndexConfig(filters_max=2, delta_items_max=1_000, rebuild_items=1_000, rebuild_dead_share=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "_IVF_ITEMS_MIN", 16)
        base = AnnIndex.build(KEYS[:start], VECTORS[:start], config)
    index = LiveIndex(base, config=IndexConfig(), live=live)
    oracle = world.Oracle()
    oracle.items = {int(k): (v, None, -1, -1) for k, v in zip(KEYS[:start], VECTORS[:start], strict=True)}
    for what, where in steps:
        apply(index, oracle, what)
        assert len(index) == len(oracle.items)
        for search in (index.exact, index.search):
            got, score = search(VECTORS[:1], NUM_KEYS, where)
            right, right_score = oracle.search(VECTORS[0], NUM_KEYS, where)
            assert set(got[0][got[0] >= 0].tolist()) == set(right)
            np.testing.assert_allclose(score[0][: len(right)], right_score, atol=1e-4)


@given(n=st.integers(1, 300), data=st.data())
def test_row_sets_are_sets(n, data):
    rows = st.lists(st.integers(0, n - 1), max_size=30)
    first, second, third = (np.array(data.draw(rows), np.int64) for _ in range(3))
    made = RowSet.of(n, first)
    made.add(second)
    made.remove(third)
    right = (set(first.tolist()) | set(second.tolist())) - set(third.tolist())
    assert set(made.rows().tolist()) == right
    assert len(made) == len(right)
    assert made.has(np.arange(n)).tolist() == [i in right for i in range(n)]
    assert len(made & RowSet.of(n, second)) == len(right & set(second.tolist()))
    starts = np.array([0, *range(64, n, 64), n], np.int64)
    assert made.count_between(starts).sum() == len(right)
