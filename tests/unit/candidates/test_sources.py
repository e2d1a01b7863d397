"""Each source's own sense: what comes first, and from which events."""

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pipeline_world
import polars as pl
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.candidates import (
    buy_again,
    covisit,
    new_arrivals,
    popular,
    ranked_list,
    regression,
    swing,
    text_similar,
    trending,
    user_knn,
)
from recsys.candidates.behaviour import actions, touched
from recsys.candidates.buy_again import ANY_ITEM, BuyAgain
from recsys.candidates.covisit import Covisit, CovisitConfig
from recsys.candidates.indexes import build_all, build_online
from recsys.candidates.just_listed import JustListed
from recsys.candidates.linked import Linked, Memory
from recsys.candidates.own_history import OwnHistory
from recsys.candidates.ranked_list import RankedList, read_table
from recsys.candidates.trending import EVERYWHERE, Trending
from recsys.candidates.user_knn import UserKnn
from recsys.core import BadInput, CorruptData, EventType, key
from recsys.core.attributes import Where
from recsys.ranking.live import LiveCatalogue


def log(shop, rows):
    """Events from (user, item, type, days before the end)."""
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "event_type", "days"], orient="row")
    time = shop.UNTIL_US - (frame["days"] * shop.DAY_US).cast(pl.Int64)
    return (
        frame.with_columns(event_time=time.cast(pl.Datetime("us", "UTC")))
        .with_columns(event_id=pl.int_range(pl.len()).cast(pl.String))
        .sort("event_time", maintain_order=True)
    )


def order(table):
    return table.column("item_key").to_pylist()


def test_popular_counts_shoppers_not_clicks(shop):
    one = [("user-1", "item-1", "view", 1 + i / 1000) for i in range(50)]
    many = [(f"user-{u}", "item-2", "view", 1.0) for u in range(3)]
    assert order(popular.build(log(shop, one + many), shop.items(), shop.UNTIL_US))[0] == key("item-2")


def test_a_shop_without_items_has_no_interest(shop):
    none = replace(shop.items(), item_key=np.empty(0, np.int64), table=shop.items().table.slice(0, 0))
    events = log(shop, [("user-1", "item-1", "view", 1.0)])
    assert actions(events, none, shop.UNTIL_US).is_empty()


def test_popular_forgets(shop):
    old = [(f"user-{u}", "item-1", "purchase", 59.0) for u in range(9)]
    new = [(f"user-{u}", "item-2", "purchase", 0.5) for u in range(3)]
    assert order(popular.build(log(shop, old + new), shop.items(), shop.UNTIL_US))[0] == key("item-2")


def test_trending_prefers_growth_to_steady_sales(shop):
    steady = [(f"user-{u}", "item-1", "purchase", float(d)) for u in range(4) for d in range(1, 60)]
    rising = [(f"user-{u}", "item-2", "purchase", 1.0 + d) for u in range(4) for d in range(5)]
    events = log(shop, steady + rising)
    assert order(popular.build(events, shop.items(), shop.UNTIL_US))[0] == key("item-1")
    assert order(trending.build(events, shop.items(), shop.UNTIL_US))[0] == key("item-2")


def trends(shop, rows):
    """The source over these events; item i is in category i % 4, items from 60 on in none."""
    items = shop.items()
    category = [
        c if int(i[5:]) < 60 else None for i, c in zip(items.ids(items.item_key), items.column("category"), strict=True)
    ]
    table = items.table.set_column(items.table.column_names.index("category"), "category", [category])
    items = replace(items, table=table)
    index = trending.build(log(shop, rows), items, shop.UNTIL_US)
    return Trending(index, LiveCatalogue(items).category_key), index


@pytest.fixture
def rising(shop):
    """Item 4 n + c is wanted by 10 - c shoppers; items 61 and 62, of no category, by 20 and 1."""
    wanted = {4 * n + c: 10 - 2 * c - n for c in range(4) for n in range(1, 3)} | {61: 20, 62: 1}
    return [(f"user-{u}", f"item-{i}", "purchase", 1.0) for i, times in wanted.items() for u in range(times)]


async def test_a_newcomer_gets_what_is_trending_in_the_shop(shop, store, rising):
    source, index = trends(shop, rising)
    user = await store.user("nobody", shop.UNTIL_US, shop.NEVER)
    found = await source.retrieve(shop.query("nobody"), user, 100, shop.NEVER)
    everywhere = index.filter(pc.equal(index["category_key"], EVERYWHERE))
    assert found.item_key.tolist() == everywhere["item_key"].to_pylist()
    assert found.score("trending").tolist() == everywhere["score"].to_pylist()
    assert found.item_key[0] == key("item-61")
    assert found.score("trending")[0] == 1.0


async def test_a_shopper_gets_what_is_trending_in_the_categories_of_the_past(shop, store, rising):
    source, _ = trends(shop, rising)
    user = await store.user("nobody", shop.UNTIL_US, shop.NEVER)
    on_screen = await source.retrieve(shop.query("nobody", current_item="item-3"), user, 100, shop.NEVER)
    of_none = await source.retrieve(shop.query("nobody", current_item="item-62"), user, 100, shop.NEVER)
    nothing = await source.retrieve(shop.query("nobody"), user, 100, shop.NEVER)
    place = on_screen.item_key.tolist().index
    in_shop = nothing.item_key.tolist().index
    for in_category, other in (("item-7", "item-8"), ("item-11", "item-10")):
        assert in_shop(key(in_category)) > in_shop(key(other)), "wanted less"
        assert place(key(in_category)) < place(key(other)), "but of category 3, like the item on screen"
    np.testing.assert_array_equal(of_none.item_key, nothing.item_key)
    np.testing.assert_array_equal(of_none.scores, nothing.scores)


async def test_a_category_that_is_asked_for_is_listed_beyond_the_best_of_the_shop(shop, store, rising, monkeypatch):
    monkeypatch.setattr(ranked_list, "LIST_ITEMS_MAX", 3)
    source, _ = trends(shop, rising)
    user = await store.user("nobody", shop.UNTIL_US, shop.NEVER)
    query = shop.query("nobody", where=Where(categories=frozenset({"category-2", "category-9"})))
    found = (await source.retrieve(query, user, 100, shop.NEVER)).item_key.tolist()
    assert [i for i in found if i in (key("item-6"), key("item-10"))] == [key("item-6"), key("item-10")]
    assert len((await source.retrieve(shop.query("nobody"), user, 100, shop.NEVER)).item_key) == 3


def test_lists_of_categories_are_bounded_and_of_items_with_one(shop, monkeypatch):
    monkeypatch.setattr(trending, "CATEGORY_ITEMS_MAX", 5)
    table = pl.from_arrow(trending.build(shop.events(), shop.items(), shop.UNTIL_US))
    of_category = table.filter(pl.col("category_key") != EVERYWHERE)
    category = dict(zip(shop.items().item_key.tolist(), shop.items().column("category"), strict=True))
    assert of_category.group_by("category_key").len()["len"].to_list() == [5] * 4
    assert all(key(category[r["item_key"]]) == r["category_key"] for r in of_category.iter_rows(named=True))
    assert of_category["score"].is_between(0, 1).all()


def test_new_arrivals_are_new_and_quick_starters_come_first(shop):
    events = log(shop, [("user-1", "item-0", "view", 50.0), ("user-1", "item-75", "purchase", 0.1)])
    found = order(new_arrivals.build(events, shop.items(), shop.UNTIL_US))
    assert found[0] == key("item-75")
    assert set(found) == {key(f"item-{i}") for i in range(70, 80)}
    assert found[1] == key("item-70"), "of the untouched ones the newest"


async def test_just_listed_asks_for_what_it_needs(shop, store):
    """Arrivals are many, and every request asks."""
    newest, asked = shop.items().item_key, []

    def new_items(limit):
        asked.append(limit)
        return newest[:limit]

    user = await store.user("user-0", shop.UNTIL_US, shop.NEVER)
    old = touched(user)
    assert len(old)
    for new_only in (False, True):
        found = await JustListed(new_items).retrieve(shop.query("user-0", new_only=new_only), user, 3, shop.NEVER)
        left = newest[~np.isin(newest, old)] if new_only else newest
        assert found.item_key.tolist() == left[:3].tolist()
    assert asked == [3, 3 + len(old)]


def test_nothing_from_the_future_reaches_an_index(shop):
    past = shop.events()
    future = log(shop, [(f"user-{u}", "item-9", "purchase", -1.0) for u in range(40)])
    both = pl.concat([past, future.select(past.columns)])
    for build in (build_all, build_online):
        expected = build(past, shop.items(), shop.UNTIL_US)
        for name, table in build(both, shop.items(), shop.UNTIL_US).items():
            assert table.equals(expected[name]), name


def test_a_list_is_made_bit_for_bit_again(shop):
    """Whatever thread has which rows. One sum of a hundred differed before."""
    past, items = shop.events(), shop.items()
    first = popular.build_rates(past, items, shop.UNTIL_US)
    assert all(popular.build_rates(past, items, shop.UNTIL_US).equals(first) for _ in range(400))


def test_an_empty_log_makes_empty_indexes(shop):
    for name, table in build_all(shop.events().head(0), shop.items(), shop.UNTIL_US).items():
        assert (table.num_rows > 0) == (name in ("new_arrivals", "buy_again", "text_similar"))  # these need no actions


def test_impressions_and_returns_are_no_interest(shop):
    rows = [("user-1", "item-1", "impression", 1.0), ("user-1", "item-2", "return", 1.0)]
    assert popular.build(log(shop, rows), shop.items(), shop.UNTIL_US).num_rows == 0


def test_covisit_is_symmetric_and_sums_over_users(shop):
    rows = [(f"user-{u}", f"item-{i}", "purchase", 1.0) for u in range(3) for i in (1, 2)]
    rows += [("user-9", "item-1", "purchase", 1.0), ("user-9", "item-3", "purchase", 1.0)]
    table = covisit.build(log(shop, rows), shop.items(), shop.UNTIL_US)
    link = {(r["item_key"], r["neighbour_key"]): r["score"] for r in table.to_pylist()}
    one, two, three = key("item-1"), key("item-2"), key("item-3")
    assert link[one, two] == link[two, one] > link[one, three] == link[three, one] > 0
    assert (two, three) not in link


def test_covisit_keeps_the_nearest_neighbours_only(shop):
    few = CovisitConfig(neighbours_max=5)
    table = covisit.build(shop.events(), shop.items(), shop.UNTIL_US, few)
    assert pl.from_arrow(table)["item_key"].value_counts()["count"].max() == 5


async def test_covisit_starts_from_the_cart_of_a_newcomer(shop, store, run):
    source = Covisit.read(run.path("index/covisit.parquet"))
    user = await store.user("nobody", shop.UNTIL_US, shop.NEVER)
    found = await source.retrieve(shop.query("nobody", cart=("item-8",)), user, 10, shop.NEVER)
    on_screen = await source.retrieve(shop.query("nobody", current_item="item-8"), user, 10, shop.NEVER)
    assert len(found) == 10
    np.testing.assert_array_equal(found.item_key, on_screen.item_key)
    assert (found.score("covisit_max") <= found.score("covisit") + 1e-6).all()


async def test_an_empty_covisit_index_finds_nothing(shop, store):
    user = await store.user("user-1", shop.UNTIL_US, shop.NEVER)
    assert len(await Covisit(covisit.SCHEMA.empty_table()).retrieve(shop.query(1), user, 10, shop.NEVER)) == 0


def test_covisit_settings_are_checked():
    with pytest.raises(BadInput, match="neighbours_max"):
        CovisitConfig(neighbours_max=0)
    with pytest.raises(BadInput, match="item_users_max"):
        CovisitConfig(item_users_max=1)


def swings(log_, until_us, config):
    """Swing as its formula says it, pair by pair."""
    half_life_us = min(config.half_life_days_max * 86_400e6, max((until_us - log_["time_us"].min()) / 8, 1.0))
    taken = {}
    for user, item, weight, time_us in log_.select("user", "item_key", "weight", "time_us").iter_rows():
        strongest, newest = taken.setdefault(user, {}).get(item, (0.0, 0))
        taken[user][item] = (max(strongest, weight), max(newest, time_us))
    a = {
        user: {
            item: strongest**0.25 * 2 ** -((until_us - newest) / (4 * half_life_us))
            for item, (strongest, newest) in sorted(of.items(), key=lambda x: (-x[1][1], x[0]))[: config.user_items_max]
        }
        for user, of in taken.items()
    }
    link = defaultdict(float)
    for u, v in itertools.combinations([u for u in a if len(a[u]) > 1], 2):
        both = a[u].keys() & a[v].keys()
        if len(both) < 2:
            continue
        say = 1 / (math.sqrt(len(a[u]) * len(a[v])) * (config.alpha + len(both)))
        for i, j in itertools.permutations(both, 2):
            link[i, j] += say * a[u][i] * a[u][j] * a[v][i] * a[v][j]
    users = Counter(item for of in taken.values() for item in of)
    damped = {item: 1 / (n + config.shrink) for item, n in users.items()}
    return {(i, j): damped[i] * damped[j] * total for (i, j), total in link.items()}


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 7), st.sampled_from(["view", "purchase"]), st.integers(1, 50)),
        min_size=1, max_size=60,
    ),
    alpha=st.sampled_from([0.0, 1.0, 5.0]),
    user_items_max=st.sampled_from([3, 50]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_swing_is_its_formula(rows, alpha, user_items_max):
    events = log(pipeline_world, [(f"user-{u}", f"item-{i}", kind, float(days)) for u, i, kind, days in rows])
    config = CovisitConfig(alpha=alpha, user_items_max=user_items_max, half_life_days_max=10.0)
    until_us, items = pipeline_world.UNTIL_US, pipeline_world.items()
    link = links(swing.build(events, items, until_us, config))
    expected = swings(actions(events, items, until_us), until_us, config)
    assert link.keys() == expected.keys()
    assert link == pytest.approx(expected, rel=1e-4)


def test_swing_trusts_pairs_with_little_in_common(shop):
    """Items 1 and 2 are shared by shoppers who share nothing else, 3 and 4 by shoppers who share everything."""
    rows = [(f"user-{u}", f"item-{i}", "purchase", 1.0) for u in (1, 2) for i in (1, 2, 10 * u, 10 * u + 1)]
    rows += [(f"user-{u}", f"item-{i}", "purchase", 1.0) for u in (3, 4) for i in (3, 4, 5, 6)]
    rows += [("user-5", "item-7", "purchase", 1.0), ("user-5", "item-8", "purchase", 1.0)]
    link = links(swing.build(log(shop, rows), shop.items(), shop.UNTIL_US, CovisitConfig(alpha=1.0)))
    assert link[key("item-1"), key("item-2")] > 1.5 * link[key("item-3"), key("item-4")]
    assert not any(key("item-7") in pair for pair in link), "one shopper alone is no swing"


def test_swing_counts_the_newest_users_of_an_item_and_keeps_the_nearest(shop):
    rows = [(f"user-{u}", f"item-{i}", "purchase", float(u)) for u in (1, 2) for i in (1, 2)]
    rows += [(f"user-{u}", f"item-{i}", "purchase", float(u)) for u in (3, 4) for i in (1, 3)]
    link = links(swing.build(log(shop, rows), shop.items(), shop.UNTIL_US, CovisitConfig(item_users_max=2)))
    one, two, three = key("item-1"), key("item-2"), key("item-3")
    assert {pair for pair in link if pair[0] == one} == {(one, two)}
    assert {pair for pair in link if pair[0] == three} == {(three, one)}
    few = swing.build(shop.events(), shop.items(), shop.UNTIL_US, CovisitConfig(neighbours_max=5))
    assert pl.from_arrow(few)["item_key"].value_counts()["count"].max() == 5


def test_swing_in_parts_is_swing(shop, monkeypatch):
    whole = swing.build(shop.events(), shop.items(), shop.UNTIL_US)
    monkeypatch.setattr(swing, "_ITEMS_PER_CALL", 7)
    assert swing.build(shop.events(), shop.items(), shop.UNTIL_US).equals(whole)


async def own(shop, store, pairs):
    """Own history of a user with the given (item, counts by type, first, last, last purchase, days bought)."""
    user = await store.user("nobody", shop.UNTIL_US, shop.NEVER)
    count = np.zeros((len(pairs), 7), np.int32)
    for row, (_, counts, *_rest) in enumerate(pairs):
        for kind, n in counts.items():
            count[row, kind] = n
    ago = [shop.UNTIL_US - (np.array([p[i] for p in pairs]) * shop.DAY_US).astype(np.int64) for i in (2, 3)]
    bought = count[:, EventType.PURCHASE] > 0
    user = replace(
        user,
        pair_item_key=np.array([key(p[0]) for p in pairs]),
        pair_count=count,
        pair_first_us=ago[0],
        pair_last_us=ago[0],
        pair_last_purchase_us=np.where(bought, ago[1], 0),
        pair_purchase_days=np.array([p[4] for p in pairs], np.int32),
    )
    found = await OwnHistory().retrieve(shop.query("nobody"), user, 10, shop.NEVER)
    return found.item_key.tolist()


async def test_what_is_bought_often_comes_first(shop, store):
    bought = EventType.PURCHASE
    pairs = [("item-1", {bought: 1}, 1.0, 1.0, 1), ("item-2", {bought: 5}, 9.0, 9.0, 5)]
    assert await own(shop, store, pairs) == [key("item-2"), key("item-1")]


async def test_the_open_cart_comes_before_the_finished_one(shop, store):
    done = {EventType.CART: 1, EventType.PURCHASE: 1}
    pairs = [("item-1", done, 1.0, 1.0, 1), ("item-2", {EventType.CART: 1}, 2.0, 0.0, 0)]
    assert await own(shop, store, pairs) == [key("item-2"), key("item-1")]


async def test_equals_are_ordered_by_recency(shop, store):
    seen = {EventType.VIEW: 1}
    pairs = [("item-1", seen, 3.0, 0.0, 0), ("item-2", seen, 1.0, 0.0, 0)]
    assert await own(shop, store, pairs) == [key("item-2"), key("item-1")]


def test_a_broken_index_file_is_named(tmp_path, run):
    path = tmp_path / "popular.parquet"
    path.write_bytes(b"half a file")
    with pytest.raises(CorruptData, match=r"popular\.parquet"):
        RankedList.read("popular", path)
    with pytest.raises(CorruptData, match="neighbour_key"):
        read_table(run.path("index/popular.parquet"), covisit.SCHEMA)


def links(table):
    return {(r["item_key"], r["neighbour_key"]): r["score"] for r in table.to_pylist()}


def test_regression_explains_popular_items_away(shop):
    """Everybody has item 0; item 1 goes with item 2. Item 1 speaks for 2, though it is as often seen with 0."""
    rows = [(f"user-{u}", "item-0", "purchase", 1.0) for u in range(900)]
    rows += [(f"user-{u}", f"item-{i}", "purchase", 1.0) for u in range(300) for i in (1, 2)]
    link = links(regression.build(log(shop, rows), shop.items(), shop.UNTIL_US))
    one, two, zero = key("item-1"), key("item-2"), key("item-0")
    assert link[one, two] == pytest.approx(link[two, one], rel=1e-3)
    assert link[one, two] > 1.3 * link[one, zero]


def test_covisit_says_nothing_of_what_is_a_lifetime_ago(shop):
    table = covisit.build(shop.events(), shop.items(), shop.UNTIL_US + 75 * 365 * shop.DAY_US)
    assert set(table.column("score").to_pylist()) <= {0.0}


def test_text_similar_links_rare_words(shop):
    items = shop.items()
    titles = ["red owl lamp", "blue owl cup", "red cup", "glass vase"]
    column = [titles[i] if i < len(titles) else None for i in range(len(items))]
    table = items.table.set_column(items.table.column_names.index("title"), "title", [column])
    found = links(text_similar.build(shop.events(), replace(items, table=table), shop.UNTIL_US))
    k = items.item_key
    assert {pair for pair in found if pair[0] == k[0]} == {(k[0], k[1]), (k[0], k[2])}
    assert not any(k[3] in pair for pair in found)
    assert all(0 < score <= 1 for score in found.values())


def test_text_similar_holds_the_pairs_of_a_few_items_at_a_time(shop, monkeypatch):
    """What it finds is the same to the bit, and in the same order."""
    items, rng = shop.items(), np.random.default_rng(0)
    titles = [" ".join(rng.choice(list("abcdefghijkl"), 4)) for _ in range(len(items))]
    table = items.table.set_column(items.table.column_names.index("title"), "title", [titles])
    held, nearest = [], text_similar._nearest
    monkeypatch.setattr(
        text_similar, "_nearest", lambda words, others: held.append(len(words)) or nearest(words, others)
    )
    found = []
    for pairs_max in (10**9, 300):
        monkeypatch.setattr(text_similar, "_PAIRS_MAX", pairs_max)
        found.append(text_similar.build(shop.events(), replace(items, table=table), shop.UNTIL_US))
    assert found[0].equals(found[1])
    assert len(held) > 10
    assert max(held[1:]) * 10 < held[0] == sum(held[1:])


async def test_older_baskets_count_less(shop, store):
    """The newest basket speaks with full weight, each one before it with a hundredth."""
    user = await store.user("user-2", shop.UNTIL_US, shop.NEVER)
    newest = int(user.recent_item_key[-1])
    earlier = next(int(k) for k in user.recent_item_key[-2::-1] if k != newest)
    table = covisit.SCHEMA.empty_table().from_pylist(
        [{"item_key": k, "neighbour_key": n, "score": 1.0} for n, k in enumerate(sorted((newest, earlier)), 1)],
        schema=covisit.SCHEMA,
    )
    found = await Linked("linked", table, Memory(half_life_days=1e5, step_decay=0.01)).retrieve(
        shop.query(2), user, 10, shop.NEVER
    )
    assert found.item_key[0] == sorted((newest, earlier)).index(newest) + 1


async def test_user_knn_leaves_the_shopper_out(shop, store):
    """Two shoppers share items 5 and 6; only the other one has 7, and only user-1 has 8."""
    rows = [(f"user-{u}", f"item-{i}", "purchase", 1.0) for u in (1, 2) for i in (5, 6)]
    rows += [("user-2", "item-7", "purchase", 1.0), ("user-1", "item-8", "purchase", 1.0)]
    events = log(shop, rows)
    source = UserKnn(user_knn.build(events, shop.items(), shop.UNTIL_US))
    user = await shop.store(events).user("user-1", shop.UNTIL_US, shop.NEVER)
    found = await source.retrieve(shop.query(1), user, 10, shop.NEVER)
    assert set(found.item_key) == {key(f"item-{i}") for i in (5, 6, 7)}
    new = await source.retrieve(shop.query(1, new_only=True), user, 10, shop.NEVER)
    assert new.item_key.tolist() == [key("item-7")]


async def test_buy_again_knows_what_is_bought_again_and_when(shop):
    """Everybody buys item 1 every ten days; item 2 is bought once by many. Both were last bought together."""
    rows = [(f"user-{u}", "item-1", "purchase", 2.0 + 10 * n) for u in range(1, 9) for n in range(3)]
    rows += [(f"user-{u}", "item-2", "purchase", 2.0) for u in range(1, 9)]
    rows += [("user-30", "item-1", "purchase", 2.0), ("user-30", "item-2", "purchase", 2.0)]
    events = log(shop, rows)
    table = buy_again.build(events, shop.items(), shop.UNTIL_US)
    known = {r["item_key"]: r for r in table.to_pylist()}
    assert table.column("item_key")[0].as_py() == ANY_ITEM
    assert known[key("item-1")]["repeat_share"] > known[ANY_ITEM]["repeat_share"] > known[key("item-2")]["repeat_share"]
    assert known[key("item-1")]["gap_days"] == pytest.approx(10)
    user = await shop.store(events).user("user-30", shop.UNTIL_US, shop.NEVER)
    found = await BuyAgain(table).retrieve(shop.query(30), user, 10, shop.NEVER)
    assert found.item_key.tolist() == [key("item-1"), key("item-2")]
    assert found.score("buy_again_due") == pytest.approx(0.2, rel=0.01)
