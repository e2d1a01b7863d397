"""What catalogue events do to a worker's index, with a real tower (untrained) over the small shop."""

import numpy as np
import pyarrow as pa
import pytest

from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.sharded import Shard
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import EventBatch, EventKind, Overloaded, key, keys
from recsys.core.attributes import Where, attributes_of
from recsys.models.cold import ColdItems
from recsys.models.config import LiveIndexConfig, TowerConfig
from recsys.models.text.lsa import Lsa
from recsys.models.tower import ItemRows, Tower, TowerNet
from recsys.ranking.live import LiveCatalogue
from recsys.serving.live_items import LiveItems

_KIND = {"price": EventKind.PRICE, "stock": EventKind.STOCK, "listed": EventKind.ITEM}


@pytest.fixture(scope="module")
def tower(shop):
    rows, num_rows = ItemRows.build(shop.items(), shop.items().item_key)
    return Tower(TowerNet(num_rows, TowerConfig()), rows, TowerConfig())


def over(tower, items, encoder=None):
    base = AnnIndex.build(*tower.item_vectors())
    index = LiveIndex(
        base, attributes_of(items, base.row_key), live=LiveIndexConfig(delta_items_max=40, rebuild_items=40)
    )
    return LiveItems(index, ColdItems(tower, items, encoder), LiveCatalogue(items)), index


@pytest.fixture
def live(shop, tower):
    return over(tower, shop.items())


@pytest.fixture
def titled(shop):
    """The same where titles count: "Thing number 5 in red"."""
    items = shop.items()
    encoder = Lsa.fit(items.column("title"), 16)
    text = encoder.encode(items.column("title")).astype(np.float16)
    rows, num_rows = ItemRows.build(items, items.item_key, text=text)
    return over(Tower(TowerNet(num_rows, TowerConfig(), **rows.sizes), rows, TowerConfig()), items, encoder)


def events(*told):
    """(item, time, {"price"|"stock"|"listed": value, "category": ...}) as one batch."""
    columns = {
        "price": pa.int64(),
        "stock": pa.int64(),
        "listed": pa.bool_(),
        "title": pa.string(),
        "category": pa.string(),
        "brand": pa.string(),
    }
    kinds = [next(_KIND[name] for name in ("listed", "price", "stock") if name in says) for _, _, says in told]
    return EventBatch.from_columns(
        {
            "event_id": [f"{item}@{time}:{sorted(says.items())}" for item, time, says in told],
            "kind": np.array(kinds, np.int8),
            "event_time": np.array([time for _, time, _ in told]),
            "item_id": [item for item, _, _ in told],
            **{name: pa.array([says.get(name) for _, _, says in told], type_) for name, type_ in columns.items()},
        }
    )


def everything(index, where=None):
    item_key = index.search(np.ones((1, index.dim), np.float32), 500, where or Where())[0][0]
    return set(item_key[item_key >= 0].tolist())


def test_a_shard_takes_what_is_told_of_its_own_items(shop, tower):
    told = events(*((str(i), 5, {"listed": True, "category": "category-2"}) for i in range(20)))
    held = []
    for number in range(2):
        shard, items = Shard(number, 2), shop.items()
        items = items.where(shard.holds(items.item_key))
        base = AnnIndex.build(items.item_key, tower.encode_items(items.item_key))
        index = LiveIndex(base, attributes_of(items, base.row_key))
        fed = LiveItems(index, ColdItems(tower, shop.items()), LiveCatalogue(items), shard)
        done = fed.apply(told)
        held.append(everything(index))
        assert (done.applied, done.unknown) == (len(held[-1]) - len(items), 0)
        assert shard.holds(np.array(sorted(held[-1]))).all()
    assert held[0] | held[1] == {*shop.items().item_key.tolist(), *keys(map(str, range(20))).tolist()}


def test_a_new_item_lies_where_its_category_puts_it(shop, tower, live):
    items, index = live
    done = items.apply(events(("new", 5, {"listed": True, "category": "category-2", "price": 70})))
    assert (done.applied, done.superseded, done.unknown) == (1, 0, 0)
    assert key("new") in everything(index)
    vector, placed = ColdItems(tower, shop.items()).encode(keys(["new"]), keys(["category-2"]), np.array([-1]))
    assert placed.all()
    assert index.search(vector, 1, Where(price_max_minor=70, categories=frozenset({"category-2"})))[0][0, 0] == key(
        "new"
    )


def test_the_encoder_gives_a_known_item_the_vector_of_the_run(shop, tower):
    items = shop.items()
    item_key, vectors = tower.item_vectors()
    category = np.array([key(name) for name in items.values("category", item_key)])
    encoded, placed = ColdItems(tower, items).encode(item_key, category, np.full(len(item_key), -1))
    np.testing.assert_allclose(encoded, vectors, atol=1e-6)
    assert placed.all()


def test_an_item_of_which_nothing_is_known_is_not_placed(live):
    items, index = live
    assert items.apply(events(("odd", 5, {"listed": True, "category": "never heard of"}))).unknown == 1
    assert key("odd") not in everything(index)
    assert items.apply(events(("odd", 6, {"listed": True, "category": "category-1"}))).unknown == 0
    assert key("odd") in everything(index)


def test_delisted_and_sold_out_leave_and_come_back(live):
    items, index = live
    items.apply(events(("item-5", 5, {"listed": False}), ("item-6", 5, {"stock": 0})))
    assert not {key("item-5"), key("item-6")} & everything(index)
    assert items.num_unavailable() == 2
    items.apply(events(("item-5", 6, {"listed": True}), ("item-6", 6, {"stock": 4})))
    assert {key("item-5"), key("item-6")} <= everything(index)
    assert items.num_unavailable() == 0


def test_the_greatest_event_time_wins_whatever_arrives_first(live):
    items, index = live
    items.apply(events(("item-5", 9, {"listed": False}), ("item-6", 9, {"stock": 0}), ("item-7", 9, {"price": 1})))
    late = items.apply(
        events(("item-5", 8, {"listed": True}), ("item-6", 8, {"stock": 3}), ("item-7", 8, {"price": 2}))
    )
    assert (late.applied, late.superseded) == (0, 3)
    assert not {key("item-5"), key("item-6")} & everything(index)
    assert everything(index, Where(price_max_minor=1)) == {key("item-7")}


def test_stock_told_before_the_listing_holds(live):
    items, index = live
    assert items.apply(events(("new", 5, {"stock": 0}))).unknown == 1
    items.apply(events(("new", 6, {"listed": True, "category": "category-0"})))
    assert key("new") not in everything(index)
    items.apply(events(("new", 7, {"stock": 2})))
    assert key("new") in everything(index)


def test_an_item_that_changes_category_moves(tower, live):
    items, index = live
    before = items._encoder.encode(keys(["item-8"]), keys(["category-3"]), np.array([-1]))[0]
    items.apply(events(("item-8", 5, {"listed": True, "category": "category-3"})))
    np.testing.assert_allclose(index.search(before, 1, Where(allow=keys(["item-8"])))[1], 1.0, atol=1e-5)
    assert len(index) == 80


def test_a_title_alone_places_a_new_item_and_another_one_moves_it(titled):
    items, index = titled
    encoded = [items._encoder.encode(keys(["new"]), *np.full((3, 1), -1), [f"in {c}"])[0] for c in ("red", "blue")]
    where = Where(allow=keys(["new"]))
    assert items.apply(events(("new", 5, {"listed": True, "title": "nobody knows"}))).unknown == 1
    assert items.apply(events(("new", 6, {"listed": True, "title": "in red"}))).unknown == 0
    np.testing.assert_allclose(index.search(encoded[0], 1, where)[1], 1.0, atol=1e-5)
    items.apply(events(("new", 7, {"price": 5})))
    np.testing.assert_allclose(index.search(encoded[0], 1, where)[1], 1.0, atol=1e-5)
    items.apply(events(("new", 8, {"listed": True, "title": "in blue"})))
    np.testing.assert_allclose(index.search(encoded[1], 1, where)[1], 1.0, atol=1e-5)
    items.apply(events(("new", 9, {"listed": False})))
    assert items._title == {}
    assert not index.has(keys(["new"])).any()


def test_more_news_than_the_delta_holds(live):
    items, index = live
    items.apply(events(*[(f"new-{i}", 5, {"listed": True, "category": f"category-{i % 4}"}) for i in range(150)]))
    assert len(index) == 230
    assert len(everything(index)) == 230


def test_what_the_full_delta_refused_is_still_due_after_a_restart(shop, tower, live, monkeypatch):
    items, index = live
    items.apply(events(*[(f"new-{i}", 5, {"listed": True, "category": "category-1"}) for i in range(30)]))
    refused = events(*[(f"late-{i}", 6, {"listed": True, "category": "category-1"}) for i in range(15)])
    with monkeypatch.context() as patch:
        patch.setattr(index, "wait_rebuilt", lambda _: False)
        patch.setattr(index, "_start_rebuild", lambda: None)
        with pytest.raises(Overloaded):
            items.apply(refused)
    kept = items.capture()
    for arrays, due in ((kept, True), ({n: a for n, a in kept.items() if n != "due"}, False)):  # as before it was kept
        again, restored = over(tower, shop.items())
        again.restore(arrays)
        again.apply(refused)
        assert restored.has(keys([f"late-{i}" for i in range(15)])).tolist() == [due] * 15
