"""Rows made since the run: every source that has such asks them before its own."""

import numpy as np
import pytest

from recsys.candidates import covisit
from recsys.candidates.linked import Linked, Memory
from recsys.candidates.ranked_list import EVERYBODY, RankedList
from recsys.candidates.rows import FreshRows
from recsys.candidates.trending import EVERYWHERE, Trending
from recsys.core import key
from recsys.core.index_rows import IndexRows
from recsys.ranking.live import LiveCatalogue


async def test_rows_made_since_the_run_stand_in_place_of_its_own(shop, store):
    """Three items the shopper has: one linked as in the run, one anew, one not any more; a fourth had no row."""
    user = await store.user("user-2", shop.UNTIL_US, shop.NEVER)
    kept, anew, gone, added = np.unique(user.recent_item_key)[:4].tolist()
    table = covisit.SCHEMA.empty_table().from_pylist(
        [{"item_key": k, "neighbour_key": n, "score": 1.0} for n, k in enumerate((kept, anew, gone), 1)],
        schema=covisit.SCHEMA,
    )
    fresh, memory = FreshRows(), Memory(half_life_days=1e5)
    source = Linked("linked", table, memory, fresh)
    before = await source.retrieve(shop.query(2), user, 10, shop.NEVER)
    assert set(before.item_key.tolist()) == {1, 2, 3}
    fresh.put(
        "linked",
        IndexRows(
            key=np.array([anew, gone, added]), num=np.array([2, 0, 1]), entry_key=np.array([1, 4, 5]),
            score=np.array([0.5, 2.0, 3.0], np.float32),
        ),
    )  # fmt: skip
    after = await source.retrieve(shop.query(2), user, 10, shop.NEVER)
    whole = covisit.SCHEMA.empty_table().from_pylist(
        sorted(
            (
                {"item_key": k, "neighbour_key": n, "score": score}
                for k, n, score in ((kept, 1, 1.0), (anew, 1, 0.5), (anew, 4, 2.0), (added, 5, 3.0))
            ),
            key=lambda row: row["item_key"],
        ),
        schema=covisit.SCHEMA,
    )
    expected = await Linked("linked", whole, memory).retrieve(shop.query(2), user, 10, shop.NEVER)
    assert dict(zip(after.item_key, after.score("linked"), strict=True)) == pytest.approx(
        dict(zip(expected.item_key, expected.score("linked"), strict=True))
    )
    fresh.put(
        "another",
        IndexRows(key=np.array([kept]), num=np.array([0]), entry_key=np.empty(0, np.int64), score=np.empty(0)),
    )
    assert (await source.retrieve(shop.query(2), user, 10, shop.NEVER)).item_key.tolist() == after.item_key.tolist()


async def test_lists_made_since_the_run_stand_in_place_of_its_own(shop, store, run):
    fresh, now = FreshRows(), np.array([key("item-50"), key("item-51")])
    source = Trending.read(run.path("index/trending.parquet"), LiveCatalogue(shop.items()).category_key, fresh)
    user = await store.user("nobody", shop.UNTIL_US, shop.NEVER)
    before = await source.retrieve(shop.query("nobody"), user, 100, shop.NEVER)
    score = np.array([1.0, 0.5], np.float32)
    fresh.put("trending", IndexRows(key=np.array([EVERYWHERE]), num=np.array([2]), entry_key=now, score=score))
    after = await source.retrieve(shop.query("nobody"), user, 100, shop.NEVER)
    assert len(before) > 2
    assert after.item_key.tolist() == now.tolist()
    assert after.score("trending").tolist() == [1.0, 0.5]


async def test_a_popular_list_made_since_the_run_stands_in_place_of_its_own(shop, store, run):
    fresh = FreshRows()
    source = RankedList.read("popular", run.path("index/popular.parquet"), fresh)
    user = await store.user("user-1", shop.UNTIL_US, shop.NEVER)
    assert len(source.head(shop.query(1), user)) > 2
    now, score = np.array([min(shop.acted_on("user-1")), 7]), np.array([1.0, 0.5], np.float32)
    fresh.put("popular", IndexRows(key=np.array([EVERYBODY]), num=np.array([2]), entry_key=now, score=score))
    assert source.head(shop.query(1), user).item_key.tolist() == now.tolist()
    assert source.head(shop.query(1, new_only=True), user).item_key.tolist() == [7]
