"""Ranker inputs: the right number in the right row, NaN where nothing is known."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from feature_store.views import ITEM_FEATURE_NAMES, USER_FEATURE_NAMES
from recsys.core import CorruptData, EventType, VersionMismatch, key, keys
from recsys.core.items import ItemTable
from recsys.ranking.catalogue import Catalogue
from recsys.ranking.features import FEATURE_NAMES, ITEM_VALUES, SOURCES, TITLE_NAMES, USER_VALUES, assemble
from recsys.ranking.hydrate import FeatureHydrator
from recsys.ranking.score import LocalScorer
from recsys.ranking.titles import Titles


@pytest.fixture(scope="module")
def catalogue(shop):
    return Catalogue(shop.items())


async def matrix(shop, store, catalogue, query, found):
    user = await store.user(query.user_id, query.as_of_us, shop.NEVER)
    return user, await FeatureHydrator(store, catalogue).hydrate(query, user, found, shop.NEVER)


def test_names_are_distinct_and_known_to_the_store():
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)
    assert set(ITEM_VALUES) <= set(ITEM_FEATURE_NAMES)
    assert set(USER_VALUES) <= set(USER_FEATURE_NAMES)


def test_a_price_that_float32_does_not_hold_is_rounded():
    items = ItemTable.from_table(
        pa.table({"item_id": ["villa", "tea"], "item_key": keys(["villa", "tea"]), "price": [2**62 + 1, None]})
    )
    np.testing.assert_array_equal(Catalogue(items).price(keys(["villa", "tea"])), np.float32([2.0**62, np.nan]))


async def test_own_features_are_those_of_the_pair(shop, store, catalogue):
    user = await store.user("user-1", shop.UNTIL_US, shop.NEVER)
    found = shop.candidates(user.pair_item_key[::-1])
    _, made = await matrix(shop, store, catalogue, shop.query(1), found)
    np.testing.assert_array_equal(made.column("own_purchases"), user.pair_count[::-1, EventType.PURCHASE])
    np.testing.assert_array_equal(made.column("own_purchase_days"), user.pair_purchase_days[::-1])
    since = (user.as_of_us - user.pair_last_us[::-1]) / shop.DAY_US
    np.testing.assert_allclose(made.column("own_days_since_action"), since, rtol=1e-5)
    never = user.pair_count[::-1, EventType.PURCHASE] == 0
    assert np.isnan(made.column("own_days_since_purchase")[never]).all()
    behind = made.column("own_days_behind_last_order")
    assert np.nanmin(behind) == pytest.approx(0.0, abs=1e-4), "the last order is 0 days behind itself"
    assert made.column("own_purchases_to_top").max() == 1.0


async def test_a_gap_is_the_mean_time_between_purchases(shop, store, catalogue):
    user = await store.user("user-1", shop.UNTIL_US, shop.NEVER)
    day = shop.DAY_US
    user = replace(
        user,
        pair_item_key=np.array([key("item-1")]),
        pair_count=np.array([[0, 0, 0, 0, 0, 3, 0]], np.int32),
        pair_first_us=np.array([shop.UNTIL_US - 25 * day]),
        pair_last_us=np.array([shop.UNTIL_US - 5 * day]),
        pair_last_purchase_us=np.array([shop.UNTIL_US - 5 * day]),
        pair_purchase_days=np.array([3], np.int32),
    )
    items = await store.items(["item-1"], shop.UNTIL_US, shop.NEVER)
    made = assemble(shop.query(1), user, shop.candidates([key("item-1")]), items, catalogue)
    assert made.column("own_gap_days")[0] == pytest.approx(10.0)
    assert made.column("own_gap_ratio")[0] == pytest.approx(0.5)


async def test_what_was_bought_in_number_lasts_in_proportion(shop, store, catalogue):
    user = await store.user("user-1", shop.UNTIL_US, shop.NEVER)
    day, never = shop.DAY_US, 0
    user = replace(
        user,
        values={**user.values, "quantity_level": np.log(6.0)},
        pair_item_key=np.array([key("item-1"), key("item-2"), key("item-3")]),
        pair_count=np.array([[0, 0, 0, 0, 0, 2, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0]], np.int32),
        pair_first_us=np.array([shop.UNTIL_US - 25 * day] * 3),
        pair_last_us=np.array([shop.UNTIL_US - 5 * day] * 3),
        pair_last_purchase_us=np.array([shop.UNTIL_US - 5 * day, shop.UNTIL_US - 25 * day, never]),
        pair_purchase_days=np.array([2, 1, 0], np.int32),
        pair_quantity_level=np.log(np.array([4.0, 12.0, 1.0], np.float32)),  # the first: two pieces, then eight
        pair_last_quantity_level=np.log(np.array([8.0, 12.0, 1.0], np.float32)),
    )
    items = await store.items(["item-1", "item-2", "item-3"], shop.UNTIL_US, shop.NEVER)
    found = shop.candidates([key("item-1"), key("item-2"), key("item-3")])
    made = assemble(shop.query(1), user, found, items, catalogue)
    expected = {
        "own_quantity_level": np.log([4, 12, np.nan]),
        "own_last_quantity_level": np.log([8, 12, np.nan]),
        "own_total_quantity_level": np.log([8, 12, np.nan]),
        "own_quantity_to_user": np.log([4 / 6, 2, np.nan]),
        "own_gap_ratio": [5 / 20, np.nan, np.nan],
        "own_supply_ratio": [5 / 20 * 4 / 8, np.nan, np.nan],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(made.column(name), values, rtol=1e-5, err_msg=name)
    assert (made.column("user_quantity_level") == np.float32(np.log(6.0))).all()
    beside = items.column("quantity_level") - np.log(6.0)
    np.testing.assert_allclose(made.column("item_quantity_to_user"), beside, rtol=1e-5)


async def test_titles_are_compared_with_those_of_the_newest_actions(shop, store):
    user = await store.user("user-1", shop.UNTIL_US, shop.NEVER)
    past = [key(f"item-{i}") for i in (1, 2, 3)]
    user = replace(
        user,
        recent_item_key=np.array(past),
        recent_event_type=np.full(3, EventType.VIEW, np.int8),
        recent_time_us=shop.UNTIL_US - np.arange(3, 0, -1),
    )
    # Two kinds of titles, and one item (3) and every other one without: what is alike in all of them is taken off.
    east, west, none = np.array([3, 4]) / 5, np.array([3, -4]) / 5, np.zeros(2)
    keys_M = shop.items().item_key
    text = np.stack([{key("item-1"): east, key("item-2"): west, key("item-4"): east}.get(int(k), none) for k in keys_M])
    titles = Titles(keys_M, text.astype(np.float16))
    wanted = [key(i) for i in ("item-4", "item-2", "item-3", "item-0")]
    items = await store.items(["item-4", "item-2", "item-3", "item-0"], shop.UNTIL_US, shop.NEVER)

    def made(titles, user=user):
        found = assemble(shop.query(1), user, shop.candidates(wanted), items, Catalogue(shop.items(), titles=titles))
        return np.stack([found.column(name) for name in TITLE_NAMES], axis=1)

    vectors = titles.of(np.array(wanted))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0, 0], atol=1e-6)
    like = made(titles)
    assert np.isnan(like[2:]).all(), "no title, nothing to say"
    last, closest, closest_3, mean, recent = like[0]
    assert (last, closest) == (pytest.approx(-1, abs=0.1), pytest.approx(1, abs=1e-2)), (
        "the newest with a title is item-2"
    )
    assert closest_3 == pytest.approx((last + closest) / 2) == pytest.approx(mean)
    assert recent == pytest.approx((last + 0.8 * closest) / 1.8, abs=1e-5)
    assert like[1, 0] == pytest.approx(1, abs=1e-2)
    assert np.isnan(made(None)).all()
    nobody = replace(user, recent_item_key=np.array([key("item-3")]))
    assert np.isnan(made(titles, nobody)).all(), "a past without titles"


def test_titles_of_a_run_are_read_once_for_all_arms(shop, tmp_path):
    keys_M = shop.items().item_key
    text = np.random.default_rng(0).normal(size=(len(keys_M), 8)).astype(np.float16)
    text[3] = 0

    def towers(**tensors):
        return lambda run: save_file(tensors, run.path("models/tower.safetensors"))

    run = shop.write_run(tmp_path / "run", more=towers(**{"items.key": keys_M, "items.text": text}))
    titles = Titles.load(run)
    assert titles is not None
    assert Titles.load(run) is titles
    found = titles.of(np.append(keys_M, 12345))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.append(text.any(axis=1), 0), atol=1e-6)
    apart = np.delete(text, 3, axis=0).astype(np.float32)
    apart -= apart.mean(axis=0)
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    found = np.delete(found, [3, len(keys_M)], axis=0)
    np.testing.assert_allclose(found @ found.T, apart @ apart.T, atol=0.02, err_msg="a byte a number is enough")
    again = shop.write_run(tmp_path / "run", replace=True, more=towers(**{"items.key": keys_M, "items.text": -text}))
    assert Titles.load(again) is not titles, "another run in its place"
    assert Titles.load(shop.write_run(tmp_path / "untitled", more=towers(**{"items.key": keys_M}))) is None
    assert Titles.load(shop.write_run(tmp_path / "towerless")) is None
    broken = shop.write_run(tmp_path / "broken", more=lambda r: r.path("models/tower.safetensors").write_bytes(b"no"))
    with pytest.raises(CorruptData, match=r"broken, models/tower\.safetensors"):
        Titles.load(broken)


async def test_orders_since_and_share_count_the_users_order_days(shop, store, catalogue):
    user = await store.user("user-1", shop.UNTIL_US, shop.NEVER)
    bought = user.recent_event_type == EventType.PURCHASE
    order_days = {*(user.recent_time_us[bought] // shop.DAY_US).tolist()}
    found = shop.candidates(user.pair_item_key)
    _, made = await matrix(shop, store, catalogue, shop.query(1), found)
    for row, last_us in enumerate(user.pair_last_purchase_us.tolist()):
        since = sum(day > last_us // shop.DAY_US for day in order_days) if last_us else np.nan
        np.testing.assert_equal(made.column("own_orders_since")[row], np.float32(since))
    share = user.pair_purchase_days / len(order_days)
    np.testing.assert_allclose(made.column("own_order_share"), share, rtol=1e-6)


async def test_sources_scores_and_positions(shop, store, catalogue):
    found = shop.candidates([key("item-1"), key("item-2")], [0.3, 0.9], "popular")
    _, made = await matrix(shop, store, catalogue, shop.query(1), found)
    np.testing.assert_allclose(made.column("popular_score"), [0.3, 0.9])
    np.testing.assert_allclose(made.column("popular_reciprocal_rank"), [1.0, 1.0])  # one touched, one new: each leads
    assert np.isnan(made.column("covisit_score")).all()
    assert (made.column("covisit_reciprocal_rank") == 0).all()
    assert (made.column("num_sources") == 1).all()


async def test_category_affinity_and_relations(shop, store, catalogue):
    found = shop.candidates([key("item-8"), key("item-9")])
    query = shop.query(0, current_item="item-12", cart=("item-9",))
    user, made = await matrix(shop, store, catalogue, query, found)
    recent = catalogue.category(user.recent_item_key)
    share = (recent == catalogue.category(found.item_key)[0]).mean()
    assert made.column("category_affinity")[0] == pytest.approx(share, rel=1e-5)
    assert made.column("same_category_as_current").tolist() == [1.0, 0.0]
    assert made.column("same_category_as_cart").tolist() == [0.0, 1.0]
    assert np.isnan(made.column("brand_affinity")).all(), "this shop has no brands"


async def test_item_features_come_from_the_store_in_the_candidates_order(shop, store, catalogue):
    ids = ["item-9", "item-2", shop.SOLD_OUT]
    found = shop.candidates([key(i) for i in ids])
    _, made = await matrix(shop, store, catalogue, shop.query(1), found)
    items = await store.items(ids, shop.UNTIL_US, shop.NEVER)
    for name in ITEM_VALUES:
        np.testing.assert_array_equal(made.column(f"item_{name}"), items.column(name))
    assert made.column("item_stock")[2] == 0


async def test_a_stranger_and_an_unknown_item(shop, store, catalogue):
    found = shop.candidates([key("item-1"), 12345])
    _, made = await matrix(shop, store, catalogue, shop.query("nobody"), found)
    assert made.values.shape == (2, len(FEATURE_NAMES))
    assert (made.column("own_purchases") == 0).all()
    assert np.isnan(made.column("own_days_since_action")).all()
    assert np.isnan(made.column("item_age_days")[1])


@pytest.mark.parametrize("new_only", [False, True])
async def test_the_ranker_is_told_what_was_asked_for(shop, store, catalogue, new_only):
    found = shop.candidates([key("item-1"), key("item-2")])
    _, made = await matrix(shop, store, catalogue, shop.query(1, new_only=new_only), found)
    assert made.column("new_only").tolist() == [float(new_only)] * 2


async def test_no_candidates(shop, store, catalogue):
    _, made = await matrix(shop, store, catalogue, shop.query(1), shop.candidates([]))
    assert made.values.shape == (0, len(FEATURE_NAMES))


async def test_a_matrix_does_not_depend_on_who_else_is_a_candidate(shop, store, catalogue):
    """But for positions: those are among the candidates."""
    keys = [key(f"item-{i}") for i in range(20)]
    _, many = await matrix(shop, store, catalogue, shop.query(2), shop.candidates(keys))
    _, few = await matrix(shop, store, catalogue, shop.query(2), shop.candidates(keys[:5]))
    alone = [n for n in FEATURE_NAMES if not n.endswith("_rank") and n.removesuffix("_score") not in SOURCES]
    for name in alone:
        np.testing.assert_array_equal(many.column(name)[:5], few.column(name))


def test_a_ranker_of_other_features_is_refused():
    class Foreign:
        version, feature_names = "7", ("own_purchases", "moon_phase")

    with pytest.raises(VersionMismatch, match=r"moon_phase.*Train again"):
        LocalScorer(Foreign())
