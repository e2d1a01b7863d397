"""Values against a plain Python reading of the declarations."""

import math
from collections import Counter

import numpy as np
import pytest

from feature_store import FeatureStatus
from feature_store.online import MemoryStore
from feature_store.views import ITEM_FEATURE_NAMES, USER_FEATURE_NAMES, VIEW_SET
from recsys.core import Deadline, EventBatch, EventKind, EventType, key

HOUR, DAY = 3_600_000_000, 86_400_000_000
START = 20_000 * DAY
NOW = START + 40 * DAY + 5 * HOUR + 17
NEVER = Deadline.never()
WINDOWS = {"1h": (HOUR, HOUR // 6), "1d": (DAY, HOUR), "7d": (7 * DAY, DAY), "30d": (30 * DAY, DAY)}


def actions(n: int = 3_000, seed: int = 0) -> dict[str, list]:
    rng = np.random.default_rng(seed)
    return {
        "event_id": [f"e{i}" for i in range(n)],
        "kind": [int(EventKind.ACTION)] * n,
        "event_type": rng.integers(1, 7, n).tolist(),
        "event_time": np.sort(rng.integers(START, NOW, n)).tolist(),
        "user_id": [f"u{i}" for i in rng.integers(0, 20, n)],
        "item_id": [f"i{i}" for i in rng.integers(0, 30, n)],
        "price": [None if p < 300 else int(p) for p in rng.integers(0, 5_000, n)],
        "quantity": [None if q < 0.2 else int(9**q) for q in rng.random(n)],
    }


@pytest.fixture(scope="module")
def columns() -> dict[str, list]:
    return actions()


@pytest.fixture(scope="module")
def store(columns) -> MemoryStore:
    store = MemoryStore()
    store.apply(EventBatch.from_columns(columns))
    return store


def rows(columns, **where):
    names = list(columns)
    return [
        r
        for r in (dict(zip(names, v, strict=True)) for v in zip(*columns.values(), strict=True))
        if all(r[k] == v for k, v in where.items())
    ]


def windowed(found, name):
    length, width = WINDOWS[name]
    return sum(1 for r in found if (NOW - length) // width <= r["event_time"] // width)


async def test_counts_by_behaviour_and_window(columns, store):
    user = await store.user("u3", NOW, NEVER)
    items = await store.items(["i4"], NOW, NEVER)
    for behaviour in EventType:
        if behaviour is EventType.NONE:
            continue
        mine = rows(columns, user_id="u3", event_type=int(behaviour))
        theirs = rows(columns, item_id="i4", event_type=int(behaviour))
        for window in WINDOWS:
            assert user.values[f"{behaviour.label}_count_{window}"] == windowed(mine, window)
            assert items.column(f"{behaviour.label}_count_{window}")[0] == windowed(theirs, window)
        assert user.values[f"{behaviour.label}_count_all"] == len(mine)
        assert items.column(f"{behaviour.label}_count_all")[0] == len(theirs)


async def test_recent_actions_oldest_first_without_impressions(columns, store):
    user = await store.user("u3", NOW, NEVER)
    mine = [r for r in rows(columns, user_id="u3") if r["event_type"] != EventType.IMPRESSION]
    expected = [(r["event_time"], r["event_type"]) for r in mine]
    returns = [e for e in expected if e[1] == EventType.RETURN][-32:]
    expected = [e for e in expected if e[1] != EventType.RETURN or e in returns]
    assert list(zip(user.recent_time_us.tolist(), user.recent_event_type.tolist(), strict=True)) == expected


async def test_pairs_hold_counts_times_and_purchase_days(columns, store):
    user = await store.user("u5", NOW, NEVER)
    touched = {r["item_id"] for r in rows(columns, user_id="u5") if r["event_type"] != EventType.IMPRESSION}
    assert set(user.pair_item_key.tolist()) == {key(i) for i in touched}
    for item_id in touched:
        at = user.pair_item_key.tolist().index(key(item_id))
        mine = [r for r in rows(columns, user_id="u5", item_id=item_id) if r["event_type"] != EventType.IMPRESSION]
        bought = [r["event_time"] for r in mine if r["event_type"] == EventType.PURCHASE]
        count = Counter(r["event_type"] for r in mine)
        assert user.pair_count[at].tolist() == [count[t] for t in range(7)]
        assert user.pair_first_us[at] == mine[0]["event_time"]
        assert user.pair_last_us[at] == mine[-1]["event_time"]
        assert user.pair_last_purchase_us[at] == max(bought, default=0)
        assert user.pair_purchase_days[at] == len({t // DAY for t in bought})


async def test_recency_prices_and_hours(columns, store):
    user = await store.user("u7", NOW, NEVER)
    mine = rows(columns, user_id="u7")
    last_cart = max(r["event_time"] for r in mine if r["event_type"] == EventType.CART)
    assert user.values["days_since_cart"] == pytest.approx((NOW - last_cart) / DAY)
    paid = [r["price"] for r in mine if r["event_type"] == EventType.PURCHASE and r["price"]]
    assert user.values["purchase_price_mean"] == pytest.approx(np.mean(paid))
    priced = [math.log(r["price"]) for r in mine if r["price"]]
    assert user.values["price_level"] == pytest.approx(np.mean(priced), abs=1e-3)
    hours = [r["event_time"] // HOUR % 24 for r in mine if r["event_type"] != EventType.IMPRESSION]
    near = sum(h in ((NOW // HOUR + d) % 24 for d in (-1, 0, 1)) for h in hours)
    assert user.values["hour_share"] == pytest.approx(near / len(hours))


async def test_quantities_are_those_of_purchases_and_one_where_nothing_is_said(columns, store):
    user = await store.user("u5", NOW, NEVER)
    items = await store.items(["i4", "unknown"], NOW, NEVER)

    def level(found):  # as kept, in eighths of a doubling
        return np.mean([round(math.log2(r["quantity"] or 1) * 8) / 8 for r in found]) * math.log(2.0)

    mine = rows(columns, user_id="u5", event_type=int(EventType.PURCHASE))
    assert user.values["quantity_level"] == pytest.approx(level(mine))
    exact = np.mean([math.log(r["quantity"] or 1) for r in mine])
    assert user.values["quantity_level"] == pytest.approx(exact, abs=math.log(2.0) / 16)
    theirs = rows(columns, item_id="i4", event_type=int(EventType.PURCHASE))
    assert items.column("quantity_level").tolist() == pytest.approx([level(theirs), math.nan], nan_ok=True)
    assert {r["item_id"] for r in mine} < {f"i{i}" for i in range(30)}
    for item_id in {r["item_id"] for r in rows(columns, user_id="u5")}:
        bought = [r for r in mine if r["item_id"] == item_id]
        at = user.pair_item_key.tolist().index(key(item_id)) if key(item_id) in user.pair_item_key else None
        if not bought:
            assert at is None or user.pair_quantity_level[at] == user.pair_last_quantity_level[at] == 0
            continue
        last = [r for r in bought if r["event_time"] // DAY == bought[-1]["event_time"] // DAY]
        assert user.pair_quantity_level[at] == pytest.approx(level(bought), abs=1e-6)
        assert user.pair_last_quantity_level[at] == pytest.approx(level(last), abs=1e-6)


async def test_the_largest_quantities_of_one_day_are_kept_whole():
    store, most = MemoryStore(), 2**31 - 1
    n = 40
    store.apply(
        EventBatch.from_columns(
            {
                "event_id": [f"e{i}" for i in range(n)],
                "kind": [int(EventKind.ACTION)] * n,
                "event_type": [int(EventType.PURCHASE)] * n,
                "event_time": [START + i for i in range(n)],
                "user_id": ["u"] * n,
                "item_id": ["i"] * n,
                "quantity": [most] * n,
            }
        )
    )
    user = await store.user("u", NOW, NEVER)
    expected = pytest.approx([31 * math.log(2.0)])
    assert user.pair_quantity_level.tolist() == expected
    assert user.pair_last_quantity_level.tolist() == expected
    assert [user.values["quantity_level"]] == expected


async def test_trend_halves_with_its_half_life(store, columns):
    items = await store.items(["i4"], NOW, NEVER)
    days = Counter(r["event_time"] // DAY for r in rows(columns, item_id="i4", event_type=int(EventType.VIEW)))
    kept = [d for d in days if d >= (NOW - 30 * DAY) // DAY]
    expected = sum(days[d] * 2 ** (-max(NOW - d * DAY - DAY // 2, 0) / (7 * DAY)) for d in kept)
    assert items.column("view_trend_7d")[0] == pytest.approx(expected, rel=1e-5)


async def test_catalogue_fields_are_won_by_the_latest_event():
    store = MemoryStore()
    kinds = [EventKind.ITEM, EventKind.PRICE, EventKind.PRICE, EventKind.STOCK, EventKind.STOCK]
    store.apply(
        EventBatch.from_columns(
            {
                "event_id": list("abcde"),
                "kind": [int(k) for k in kinds],
                "event_time": [START, START + 3, START + 2, START + 5, START + 4],
                "item_id": ["i"] * 5,
                "price": [1_000, 700, 900, None, None],
                "stock": [None, None, None, 0, 8],
                "listed": [True, None, None, None, None],
            }
        )
    )
    found = await store.items(["i", "unknown"], START + DAY, NEVER)
    value = {n: found.column(n)[0] for n in ("price", "stock", "listed", "age_days", "discount_first")}
    assert value == pytest.approx({"price": 700, "stock": 0, "listed": 1, "age_days": 1, "discount_first": 0.3})
    assert (found.status[1] == FeatureStatus.NOT_FOUND).all()
    assert np.isnan(found.values[1]).all()


async def test_a_value_that_nobody_gave_is_null_and_an_unknown_user_not_found(store):
    items = await store.items(["i4"], NOW, NEVER)
    assert items.status[0, items.names.index("stock")] == FeatureStatus.NULL
    user = await store.user("nobody", NOW, NEVER)
    assert user.status is FeatureStatus.NOT_FOUND
    assert set(user.values) == set(USER_FEATURE_NAMES)
    assert not len(user.recent_item_key)


async def test_a_value_does_not_depend_on_its_neighbours(store):
    alone = await store.items(["i9"], NOW, NEVER)
    among = await store.items([f"i{i}" for i in range(30)], NOW, NEVER)
    np.testing.assert_array_equal(alone.values[0], among.values[9])


async def test_reading_is_as_of_a_time(columns):
    store = MemoryStore()
    store.apply(EventBatch.from_columns(columns))
    early = await store.user("u3", START + 10 * DAY, NEVER)
    assert early.recent_time_us.max() < START + 10 * DAY
    assert early.pair_first_us.max() < START + 10 * DAY


def test_the_view_set_has_a_version_and_unique_names():
    assert len(VIEW_SET) == 12
    assert len(set(USER_FEATURE_NAMES)) == len(USER_FEATURE_NAMES)
    assert len(set(ITEM_FEATURE_NAMES)) == len(ITEM_FEATURE_NAMES)
    assert {"price", "stock", "listed", "age_days"} <= set(ITEM_FEATURE_NAMES)


async def test_category_affinity_where_events_say_the_category():
    store = MemoryStore()
    store.apply(
        EventBatch.from_columns(
            {
                "event_id": list("abcd"),
                "kind": [1] * 4,
                "event_type": [2, 2, 3, 5],
                "event_time": [START] * 4,
                "user_id": ["u"] * 4,
                "item_id": list("wxyz"),
                "category": ["shoes", "shoes", "shoes", "hats"],
            }
        )
    )
    user = await store.user("u", START + 1, NEVER)
    assert user.values["num_categories"] == 2
    assert user.values["category_top_share"] == 0.75
    assert math.isnan(user.values["num_brands"])
