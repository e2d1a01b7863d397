"""Whatever comes in: items are distinct, excluded ones never appear, NaN sinks, no order of sources matters."""

import asyncio

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.candidates.fusion import fuse
from recsys.candidates.merge import merge
from recsys.core import Candidates, EventBatch, EventKind, Unavailable, key, keys
from recsys.core.attributes import Where
from recsys.pipeline import build
from recsys.ranking.catalogue import Catalogue
from recsys.ranking.diversify import TopSelector
from recsys.ranking.live import LiveCatalogue

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


NEW = [f"new-{i}" for i in range(6)]
names = st.sampled_from([f"category-{i}" for i in range(6)] + ["brand-0", "brand-1", "nothing"])
prices = st.none() | st.integers(0, 9_000)


class Store:
    """The shop's store, until it is `down`."""

    def __init__(self, store):
        self.store, self.view_set, self.down = store, store.view_set, False

    async def user(self, *args):
        if self.down:
            raise Unavailable("the store", came="nothing", expected="an answer", fix="Start it.")
        return await self.store.user(*args)

    async def items(self, *args):
        return await self.store.items(*args)


@pytest.fixture(scope="module")
def live_world(shop, store, run):
    """Cascades by tier over a catalogue stream that has brought items, prices and categories since the run."""
    live, failing = LiveCatalogue(shop.items()), Store(store)
    live.trusted = True
    told = [(f"item-{i}", f"category-{(i + 1) % 4}", "brand-0", 50 * i) for i in range(0, 40, 5)]
    told += [(item, f"category-{4 + i % 2}", f"brand-{i % 2}", 100 * i) for i, item in enumerate(NEW)]
    live.apply(
        EventBatch.from_columns(
            {
                "event_id": [f"told-{i}" for i in range(len(told))],
                "kind": np.full(len(told), EventKind.ITEM, np.int8),
                "event_time": np.full(len(told), shop.UNTIL_US),
                "item_id": [t[0] for t in told],
                "listed": [True] * len(told),
                "category": [t[1] for t in told],
                "brand": [t[2] for t in told],
                "price": [t[3] for t in told],
            }
        )
    )
    known = {f"item-{i}": (f"category-{i % 4}", None, 100 * (i + 1)) for i in range(shop.NUM_ITEMS)}
    known |= {item: tuple(says) for item, *says in told}
    ports = shop.ports(failing, live=live)
    return failing, {arm: build(arm, run, ports) for arm in ("retrieval", "popular")}, known


@given(
    arm=st.sampled_from(["retrieval", "popular"]),
    user=st.integers(0, 45),
    limit=st.integers(1, 100),
    categories=st.none() | st.frozensets(names, min_size=1, max_size=3),
    brands=st.none() | st.frozensets(names, min_size=1, max_size=2),
    deny=st.frozensets(names, max_size=2),
    price=st.tuples(prices, prices),
    allow=st.none() | st.lists(st.sampled_from(NEW) | item_ids, min_size=1, max_size=30, unique=True),
    exclude=st.frozensets(item_ids, max_size=10),
    new_only=st.booleans(),
    down=st.booleans(),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_slate_on_any_tier_holds_what_was_not_asked_for_and_it_is_full_where_enough_matches(
    shop, live_world, arm, user, limit, categories, brands, deny, price, allow, exclude, new_only, down
):
    failing, cascades, known = live_world
    where = Where(
        categories=categories, brands=brands, deny_categories=deny, deny_brands=deny,
        price_min_minor=price[0], price_max_minor=price[1], allow=None if allow is None else keys(allow),
    )  # fmt: skip
    wanted = {
        item
        for item, (category, brand, minor) in known.items()
        if (categories is None or category in categories)
        and (brands is None or brand in brands)
        and not {category, brand} & deny
        and (price[0] is None or minor >= price[0])
        and (price[1] is None or minor <= price[1])
        and (allow is None or item in allow)
        and item not in exclude
    }
    failing.down = down  # then the answer is the cached slate, or what is popular
    query = shop.query(user, limit=limit, where=where, exclude=exclude, new_only=new_only)
    slate = asyncio.run(cascades[arm].recommend(query, shop.NEVER))
    shown = [i.item_id for i in slate.items]
    assert len(shown) == len(set(shown))
    assert set(shown) <= wanted
    sellable = wanted - {shop.SOLD_OUT, shop.DELISTED}
    if new_only and not down:
        acted_on = shop.acted_on(f"user-{user}")
        sellable = {i for i in sellable if key(i) not in acted_on}
    if where.restricts:
        assert len(shown) >= min(limit, len(sellable))
