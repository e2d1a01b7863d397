"""What every candidate source promises, on every source."""

import numpy as np
import pytest

from recsys.candidates import covisit, regression, text_similar
from recsys.candidates.ann import LocalAnnSource
from recsys.candidates.buy_again import BuyAgain
from recsys.candidates.covisit import Covisit
from recsys.candidates.linked import Linked
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.static import AnnIndex
from recsys.candidates.own_history import OwnHistory
from recsys.candidates.own_history_popular import OwnHistoryPopular
from recsys.candidates.ranked_list import RankedList
from recsys.candidates.trending import Trending
from recsys.candidates.user_knn import UserKnn
from recsys.models.config import TowerConfig
from recsys.models.tower import ItemRows, Tower, TowerNet
from recsys.ranking.live import LiveCatalogue

LISTS = ("popular", "new_arrivals")
LINKED = {
    "swing": covisit.DEFAULT.memory,
    "regression": regression.MEMORY,
    "text_similar": text_similar.MEMORY,
}
OWN = ("own_history", "buy_again")  # says nothing about new items
PERSONAL = (*OWN, "covisit", "user_knn", "ann", *LINKED)  # says nothing to a newcomer


@pytest.fixture(scope="session")
def ann(shop):
    """The real tower, untrained, and its index."""
    rows, num_rows = ItemRows.build(shop.items(), shop.items().item_key)
    config = TowerConfig()
    tower = Tower(TowerNet(num_rows, config), rows, config)
    return LocalAnnSource(tower, LiveIndex(AnnIndex.build(*tower.item_vectors())))


@pytest.fixture(params=["own_history_popular", "trending", *PERSONAL, *LISTS])
def source(request, run, shop):
    name = request.param
    if name in LISTS:
        return RankedList.read(name, run.path(f"index/{name}.parquet"))
    if name == "trending":
        return Trending.read(run.path("index/trending.parquet"), LiveCatalogue(shop.items()).category_key)
    if name == "covisit":
        return Covisit.read(run.path("index/covisit.parquet"))
    if name in LINKED:
        return Linked.load(name, run.path(f"index/{name}.parquet"), LINKED[name])
    if name == "user_knn":
        return UserKnn.read(run.path("index/user_knn.parquet"))
    if name == "buy_again":
        return BuyAgain.read(run.path("index/buy_again.parquet"))
    if name == "own_history":
        return OwnHistory()
    if name == "own_history_popular":
        return OwnHistoryPopular(RankedList.read("popular", run.path("index/popular.parquet")))
    return request.getfixturevalue("ann")


async def found(source, shop, store, query, limit=20):
    user = await store.user(query.user_id, query.as_of_us, shop.NEVER)
    return await source.retrieve(query, user, limit, shop.NEVER)


async def test_distinct_items_best_first(source, shop, store):
    result = await found(source, shop, store, shop.query(1), 50)
    score = result.scores[:, 0]
    assert result.source_names == (source.name,)
    assert result.score_names[0] == source.name
    assert all(n.startswith(source.name) for n in result.score_names)
    assert 0 < len(result) <= 50
    assert len(np.unique(result.item_key)) == len(result)
    assert np.isfinite(score).all()
    assert (np.diff(score) <= 0).all()
    assert (result.source_bits == 1).all()


async def test_fewer_items_are_the_head_of_more(source, shop, store):
    few, many = [await found(source, shop, store, shop.query(2), n) for n in (5, 30)]
    np.testing.assert_array_equal(few.item_key, many.item_key[:5])


async def test_same_question_same_answer(source, shop, store):
    first, second = [await found(source, shop, store, shop.query(3)) for _ in range(2)]
    np.testing.assert_array_equal(first.item_key, second.item_key)
    np.testing.assert_array_equal(first.scores, second.scores)


async def test_new_only_leaves_out_what_the_user_touched(source, shop, store):
    result = await found(source, shop, store, shop.query(4, new_only=True))
    assert not set(result.item_key.tolist()) & shop.acted_on("user-4")


async def test_a_newcomer_is_no_error(source, shop, store):
    result = await found(source, shop, store, shop.query("nobody"))
    assert len(result) <= 20
    assert len(result) == (0 if source.name in PERSONAL else min(20, len(result)))


async def test_more_than_there_is(source, shop, store):
    result = await found(source, shop, store, shop.query(5), 100_000)
    assert 0 < len(result) <= shop.NUM_ITEMS
