"""Filters and selection."""

import numpy as np
import pytest

from recsys.core import key
from recsys.ranking.catalogue import Catalogue
from recsys.ranking.diversify import TopSelector
from recsys.ranking.filter import Delisted, Excluded, SoldOut, Touched, Unlisted
from recsys.ranking.hydrate import FeatureHydrator


@pytest.fixture(scope="module")
def catalogue(shop):
    return Catalogue(shop.items())


async def kept(shop, store, catalogue, f, query, ids, *, hydrated=True):
    found = shop.candidates([key(i) for i in ids])
    user = await store.user(query.user_id, query.as_of_us, shop.NEVER)
    hydrator = FeatureHydrator(store, catalogue)
    features = await hydrator.hydrate(query, user, found, shop.NEVER) if hydrated else None
    mask = f.keep(query, user, found, features)
    return [i for i, k in zip(ids, mask, strict=True) if k]


async def test_excluded_cart_and_current(shop, store, catalogue):
    query = shop.query(1, exclude=frozenset({"item-1"}), cart=("item-2",), current_item="item-5")
    ids = ["item-1", "item-2", "item-5", "item-6"]
    assert await kept(shop, store, catalogue, Excluded(), query, ids) == ["item-6"]


async def test_touched_counts_only_when_new_is_wanted(shop, store, catalogue):
    ids = [f"item-{i}" for i in range(shop.NUM_ITEMS)]
    assert await kept(shop, store, catalogue, Touched(), shop.query(1), ids) == ids
    new = await kept(shop, store, catalogue, Touched(), shop.query(1, new_only=True), ids)
    assert {key(i) for i in new} == {key(i) for i in ids} - shop.acted_on("user-1")


async def test_sold_out_and_delisted(shop, store, catalogue):
    ids = ["item-1", shop.SOLD_OUT, shop.DELISTED]
    assert await kept(shop, store, catalogue, SoldOut(), shop.query(1), ids) == ["item-1", shop.DELISTED]
    assert await kept(shop, store, catalogue, Delisted(), shop.query(1), ids) == ["item-1", shop.SOLD_OUT]
    for f in (SoldOut(), Delisted()):
        assert await kept(shop, store, catalogue, f, shop.query(1), ids, hydrated=False) == ids


async def test_what_the_run_does_not_know_has_no_id(shop, store, catalogue):
    assert await kept(shop, store, catalogue, Unlisted(catalogue), shop.query(1), ["item-1", "ghost"]) == ["item-1"]


def test_best_first_non_finite_last_ties_by_key(shop, catalogue):
    found = shop.candidates([5, 4, 3, 2, 1])
    score = np.array([1.0, np.nan, 2.0, 1.0, np.inf], np.float32)
    selection = TopSelector(catalogue).select(shop.query(1), found, score, 4)
    assert found.item_key[selection.rows].tolist() == [3, 2, 5, 1]
    assert (selection.propensity == 1.0).all()


@pytest.mark.parametrize("limit", [0, -1])
def test_no_places_no_rows(shop, catalogue, limit):
    found = shop.candidates([1, 2])
    assert len(TopSelector(catalogue).select(shop.query(1), found, np.ones(2, np.float32), limit).rows) == 0


def test_a_category_over_its_cap_moves_back_and_nothing_is_lost(shop, catalogue):
    ids = ["item-0", "item-4", "item-8", "item-1", "item-5"]  # categories 0 0 0 1 1
    found = shop.candidates([key(i) for i in ids])
    score = np.array([5, 4, 3, 2, 1], np.float32)
    rows = TopSelector(catalogue, category_items_max=2).select(shop.query(1), found, score, 5).rows
    assert [ids[r] for r in rows] == ["item-0", "item-4", "item-1", "item-5", "item-8"]
