"""Whatever comes in: items are distinct, excluded ones never appear, NaN sinks, no order of sources matters."""

import asyncio

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.candidates.merge import fuse, merge
from recsys.core import Candidates, key
from recsys.pipeline import build
from recsys.ranking.catalogue import Catalogue
from recsys.ranking.diversify import TopSelector

SOURCES = ("a", "b", "c")
scores = st.floats(allow_nan=True, allow_infinity=True, width=32)
lists = st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), min_size=3, max_size=3)
item_ids = st.integers(0, 90).map(lambda i: f"item-{i}")  # some of them unknown to the shop


def source(name: str, ids: list[int]) -> Candidates:
    return Candidates.from_source(name, np.array(ids, np.int64), np.arange(len(ids), 0, -1, dtype=np.float32))


@given(lists, st.integers(1, 12), st.permutations(range(3)))
def test_merge_keeps_every_item_once_whatever_the_order_of_sources(ids, quota, order):
    found = [source(n, i) for n, i in zip(SOURCES, ids, strict=True)]
    quotas = dict.fromkeys(SOURCES, quota)
    union = merge(found, quotas)
    assert len(set(union.item_key.tolist())) == len(union)
    assert set(union.item_key.tolist()) == {i for part in ids for i in part[:quota]}
    for row, item in enumerate(union.item_key.tolist()):
        assert set(union.sources_of(row)) == {n for n, part in zip(SOURCES, ids, strict=True) if item in part[:quota]}
    shuffled = merge([found[i] for i in order], quotas)
    np.testing.assert_array_equal(union.item_key, shuffled.item_key)
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    np.testing.assert_array_equal(fuse(union, weights, ["c"]), fuse(shuffled, weights, ["c"]))


@pytest.fixture(scope="module")
def catalogue(shop):
    return Catalogue(shop.items())


@given(st.lists(scores, max_size=30), st.integers(0, 40), st.integers(0, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_select_never_loses_or_repeats_and_non_finite_scores_sink(shop, catalogue, values, limit, cap):
    score = np.array(values, np.float32)
    found = shop.candidates([key(f"item-{i}") for i in range(len(score))])
    rows = TopSelector(catalogue, cap).select(shop.query(1), found, score, limit).rows
    assert len(rows) == min(limit, len(score)) == len(set(rows.tolist()))
    if not cap:
        finite = np.isfinite(score[rows])
        assert (np.diff(finite.astype(int)) <= 0).all()
        assert (np.diff(score[rows][finite]) <= 0).all()


@pytest.fixture(scope="module")
def cascade(shop, store, run):
    return build("retrieval", run, shop.ports(store))


@given(
    user=st.integers(0, 45),
    limit=st.integers(1, 120),
    exclude=st.frozensets(item_ids, max_size=60),
    cart=st.lists(item_ids, max_size=5),
    current=st.one_of(st.just(""), item_ids),
    new_only=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_slate_keeps_its_promises(shop, cascade, user, limit, exclude, cart, current, new_only):
    query = shop.query(user, limit=limit, exclude=exclude, cart=tuple(cart), current_item=current, new_only=new_only)
    slate = asyncio.run(cascade.recommend(query, shop.NEVER))
    shown = [i.item_id for i in slate.items]
    assert len(shown) == len(set(shown)) <= limit
    assert not set(shown) & ({*exclude, *cart, current} | {shop.SOLD_OUT, shop.DELISTED})
    if new_only:
        assert not {key(i) for i in shown} & shop.acted_on(f"user-{user}")
    score = [i.score for i in slate.items]
    assert score == sorted(score, reverse=True)
    assert all(i.sources and i.reason and i.propensity == 1.0 for i in slate.items)
