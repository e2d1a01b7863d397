"""What every index of item vectors promises, on every variant."""

import numpy as np
import pytest
import vectors_world as world

from recsys.candidates.nearest.gpu import num_devices
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.sharded import ShardedIndex, shard_of
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import BadInput, VersionMismatch
from recsys.core.attributes import Attributes, Where
from recsys.models.config import IndexConfig

M, K = 2_000, 20
CATEGORIES = ["shoes", "hats", "tea", None]
VARIANTS = ("flat", "hnsw", "ivf", "delta", "changed", "sharded")
GPU = [pytest.param("gpu", marks=pytest.mark.gpu)] if num_devices() else []


def settings(kind):
    return IndexConfig(kind=kind, recall_k=K, recall_target=0.99, exact_rows_max=64)


@pytest.fixture(scope="module")
def goods():
    """Keys, vectors, category names, attributes: item i costs 10 i, every seventh is sold out."""
    price = np.where(np.arange(M) % 11 == 0, -1, np.arange(M) * 10)
    stock = np.where(np.arange(M) % 7 == 0, 0, np.where(np.arange(M) % 2 == 0, -1, 5))
    names = [CATEGORIES[i % 4] for i in range(M)]
    known = Attributes.of(M, category=names, price_minor=price, stock_units=stock)
    return world.keys(M), world.vectors(M), names, known


def live(goods, config, part=slice(None)):
    item_key, vectors, _, known = goods
    base = AnnIndex.build(item_key[part], vectors[part], config)
    by_key = {k: i for i, k in enumerate(item_key.tolist())}
    order = np.array([by_key[k] for k in base.row_key.tolist()], np.int64)
    return LiveIndex(base, known.take(order), config=config)


@pytest.fixture(scope="module", params=[*VARIANTS, *GPU])
def index(request, goods):
    item_key, vectors, _, known = goods
    if request.param == "gpu":
        return live(goods, IndexConfig(kind="flat", device="cuda"))
    if request.param == "delta":
        empty = LiveIndex(AnnIndex.build(item_key[:0], vectors[:0]))
        empty.upsert(item_key, vectors, known)
        return empty
    if request.param == "changed":  # half of the base replaced by the delta, some of it twice, strangers come and gone
        changed = live(goods, settings("ivf"))
        for part in (slice(0, M // 2), slice(M // 4, M // 2)):
            changed.upsert(item_key[part], vectors[part], known.take(part))
        strangers = world.keys(50, start=M)
        changed.upsert(strangers, world.vectors(50, seed=7))
        assert changed.delete(strangers) == 50
        return changed
    if request.param == "sharded":
        shard = shard_of(item_key, 3)
        return ShardedIndex([live(goods, settings("flat"), np.flatnonzero(shard == i)) for i in range(3)])
    return live(goods, settings(request.param))


@pytest.fixture(scope="module")
def oracle(goods):
    made, (item_key, vectors, names, known) = world.Oracle(), goods
    for i, k in enumerate(item_key.tolist()):
        made.items[k] = vectors[i], names[i], int(known.price_minor[i]), int(known.stock_units[i])
    return made


FILTERS = {
    "nothing": Where(),
    "sold out too": Where(sold_out=True),
    "category": Where(categories=frozenset({"tea"})),
    "two categories": Where(categories=frozenset({"tea", "hats"}), sold_out=True),
    "price": Where(price_min_minor=5_000, price_max_minor=6_000),
    "price up to": Where(price_max_minor=900),
    "allow": Where(allow=np.concatenate([world.keys(M)[::40], np.array([123_456_789])])),
    "allow one": Where(allow=world.keys(M)[1:2]),
    "category and price": Where(categories=frozenset({"shoes"}), price_min_minor=15_000),
    "allow and category": Where(categories=frozenset({"shoes"}), allow=world.keys(M)[:400]),
    "no such category": Where(categories=frozenset({"boats"})),
}


@pytest.mark.parametrize("name", FILTERS)
def test_what_it_gives_is_admitted_right_and_as_many_as_there_are(index, oracle, name):
    where, queries = FILTERS[name], world.vectors(12, seed=3)
    item_key, scores = index.search(queries, K, where)
    assert item_key.shape == scores.shape == (12, K)
    hits = possible = 0
    for query, got, score in zip(queries, item_key, scores, strict=True):
        right, right_score = oracle.search(query, K, where)
        got = got[got >= 0].tolist()
        assert len(got) == len(set(got)) == len(right)
        assert set(got) <= set(oracle.admitted(where))
        np.testing.assert_allclose(score[: len(got)], [oracle.items[k][0] @ query for k in got], atol=1e-5)
        assert (np.diff(score[: len(got)]) <= 0).all()
        assert np.isneginf(score[len(got) :]).all()
        hits += sum(score[: len(got)] >= right_score[-1] - 1e-6) if right else 0
        possible += len(right)
    assert hits >= 0.95 * possible


def test_its_size_is_the_number_of_items(index):
    assert len(index) == M


def test_more_than_there_are(index):
    item_key, scores = index.search(world.vectors(2, seed=5), M + 10, Where(sold_out=True))
    assert (np.sort(item_key[0][:M]) == np.sort(world.keys(M))).all()
    assert (item_key[:, M:] == -1).all()
    assert np.isneginf(scores[:, M:]).all()


def test_one_query_is_a_row_of_many(index):
    queries = world.vectors(40, seed=4)
    many = index.search(queries, 5, Where(sold_out=True))[0]
    one = [index.search(q[None], 5, Where(sold_out=True))[0][0] for q in queries]
    assert np.mean(many == np.stack(one)) > 0.98  # a filtered batch looks as far as its neediest query


def test_no_queries(index):
    assert index.search(np.empty((0, world.DIM), np.float32), 5)[0].shape == (0, 5)


def test_what_does_not_fit_is_refused(index):
    with pytest.raises(VersionMismatch, match=r"dimension 16.*one run"):
        index.search(np.zeros((1, 8), np.float32), 3)
    with pytest.raises(BadInput, match="NaN"):
        index.search(np.full((1, world.DIM), np.nan, np.float32), 3)
