"""Ranker inputs, made in one place for serving, replay and training alike.

Shape legend: N candidates, P user-item pairs, L recent actions, F features. NaN = missing; the ranker imputes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_store import ItemFeatures, UserFeatures
from recsys.core import Candidates, EventType, Query, keys
from recsys.core.ids import find_rows
from recsys.ranking.base import FeatureMatrix
from recsys.ranking.catalogue import UNKNOWN, Catalogue
from recsys.ranking.titles import Titles

Floats = npt.NDArray[np.float32]
DAY_US = 86_400_000_000
_TITLES_BACK, _TITLE_FADING = 50, np.float32(0.8)  # actions, and by how much each counts less than the one after it

SOURCES = (
    "own_history", "buy_again", "buy_again_share", "buy_again_due", "covisit", "covisit_max", "swing",
    "swing_max", "regression", "regression_max", "user_knn", "text_similar", "text_similar_max", "trending", "popular",
    "new_arrivals", "ann", "retrieval",
)  # fmt: skip
_COUNTED = ("view", "favorite", "cart", "purchase", "return")
ITEM_VALUES = (
    *(f"{b}_count_{w}" for b in _COUNTED for w in ("1d", "7d", "30d", "all")),
    *(f"{b}_trend_{d}" for b in ("view", "cart", "purchase") for d in ("6h", "7d")),
    "days_since_view", "days_since_cart", "days_since_purchase", "view_rate_30d", "purchase_rate_30d",
    "price", "discount_first", "discount_usual", "stock", "listed", "age_days", "quantity_level",
)  # fmt: skip
USER_VALUES = (
    "view_count_1d", "view_count_7d", "cart_count_1d", "cart_count_7d", "purchase_count_7d", "purchase_count_30d",
    "purchase_count_all", "days_since_any", "age_days", "price_level", "num_items_touched", "num_purchase_days",
    "num_categories", "category_top_share", "quantity_level",
)  # fmt: skip

OWN_NAMES = (
    "own_views", "own_favorites", "own_carts", "own_purchases", "own_returns", "own_purchase_days",
    "own_purchase_share", "own_purchases_to_top", "own_days_since_action", "own_days_since_purchase",
    "own_days_since_first", "own_days_behind_last_order", "own_in_last_order", "own_gap_days", "own_gap_ratio",
    "own_user_gap_ratio", "own_order_share", "own_orders_since", "own_steps_back", "own_recent_actions",
    "own_quantity_level", "own_last_quantity_level", "own_total_quantity_level", "own_quantity_to_user",
    "own_supply_ratio",
)  # fmt: skip
USER_NAMES = (*(f"user_{n}" for n in USER_VALUES), "user_days_since_order", "user_order_gap_days", "user_repeat_rate")
SOURCE_NAMES = (*(f"{s}_score" for s in SOURCES), *(f"{s}_reciprocal_rank" for s in SOURCES), "num_sources")
ITEM_NAMES = (*(f"item_{n}" for n in ITEM_VALUES), "item_price_to_user", "item_quantity_to_user")
RELATION_NAMES = (
    "category_affinity", "brand_affinity", "category_days_since", "same_category_as_current", "same_category_as_cart",
)  # fmt: skip
TITLE_NAMES = ("title_like_last", "title_like_closest", "title_like_closest_3", "title_like_mean", "title_like_recent")
CONTEXT_NAMES = ("hour_of_day", "day_of_week", "new_only")
FEATURE_NAMES: tuple[str, ...] = (
    *OWN_NAMES, *USER_NAMES, *SOURCE_NAMES, *ITEM_NAMES, *RELATION_NAMES, *TITLE_NAMES, *CONTEXT_NAMES,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Orders:
    """A user's orders: UTC days with a purchase, ascending; days since the last; median days between (NaN: too few)."""

    days: npt.NDArray[np.int64]
    since_days: float
    gap_days: float

    @classmethod
    def of(cls, user: UserFeatures) -> _Orders:
        """As far as the recent actions and the items' last purchases tell."""
        recent = user.recent_time_us[user.recent_event_type == EventType.PURCHASE]
        time_us = np.concatenate([recent, user.pair_last_purchase_us[user.pair_last_purchase_us > 0]])
        if not len(time_us):
            return cls(time_us, np.nan, np.nan)
        days = np.unique(time_us // DAY_US)
        gap_days = float(np.median(np.diff(days))) if len(days) > 1 else np.nan
        return cls(days, (user.as_of_us - int(time_us.max())) / DAY_US, gap_days)


def assemble(
    query: Query, user: UserFeatures, found: Candidates, items: ItemFeatures, catalogue: Catalogue
) -> FeatureMatrix:
    """FEATURE_NAMES for every candidate, as of the query's time.

    items: features of the candidates, in their order. catalogue: the run's items.
    """
    orders = _Orders.of(user)
    columns: dict[str, Floats | float] = {
        **_own(user, found.item_key, orders),
        **_user(user, orders),
        **_sources(user, found),
        **_items(user, items, catalogue.price(found.item_key)),
        **_relations(query, user, found.item_key, catalogue),
        **_titles(user, found.item_key, catalogue.titles),
        "hour_of_day": float(user.as_of_us // 3_600_000_000 % 24),
        "day_of_week": float((user.as_of_us // DAY_US + 3) % 7),  # 1970-01-01 was a Thursday; 0 = Monday
        "new_only": float(query.new_only),  # what sources and places say is relative to what was asked for
    }
    values = np.empty((len(found), len(FEATURE_NAMES)), np.float32)
    for column, name in enumerate(FEATURE_NAMES):
        values[:, column] = columns[name]
    return FeatureMatrix(names=FEATURE_NAMES, values=values)


def _own(user: UserFeatures, item_key: npt.NDArray[np.int64], orders: _Orders) -> dict[str, Floats | float]:
    """What the user did with each candidate, on the clock of the item and of the user."""
    if not len(user.pair_item_key):
        zero = ("own_views", "own_favorites", "own_carts", "own_purchases", "own_returns", "own_purchase_days")
        return {n: 0.0 if n in zero else np.nan for n in OWN_NAMES}
    row, known = _lookup(user.pair_item_key, item_key)
    count = np.where(known[:, None], user.pair_count[row], 0).astype(np.float32)
    bought = count[:, EventType.PURCHASE]
    purchase_days = np.where(known, user.pair_purchase_days[row], 0).astype(np.float32)
    all_bought = user.pair_count[:, EventType.PURCHASE]
    had = known & (bought > 0)
    since_purchase = _days(user.as_of_us, user.pair_last_purchase_us[row], had)
    since_first = _days(user.as_of_us, user.pair_first_us[row], known)
    behind = since_purchase - np.float32(orders.since_days)
    orders_until = np.searchsorted(orders.days, user.pair_last_purchase_us[row] // DAY_US, side="right")
    with np.errstate(divide="ignore", invalid="ignore"):
        gap: Floats = np.where(purchase_days > 1, (since_first - since_purchase) / (purchase_days - 1), np.nan)
        gap_ratio = since_purchase / np.maximum(gap, 0.5)
        total = np.log(bought)
    level = np.where(had, user.pair_quantity_level[row], np.nan)
    last_level = np.where(had, user.pair_last_quantity_level[row], np.nan)
    supply_ratio = gap_ratio * np.exp(level - last_level)  # twice as much lasts twice as long
    recent = user.recent_item_key[::-1]
    newest, step = np.unique(recent, return_index=True)
    at, seen = _lookup(newest, item_key)
    within = np.bincount(_lookup(newest, recent)[0], minlength=len(newest)) if len(newest) else np.zeros(1)
    return {
        "own_views": count[:, EventType.VIEW],
        "own_favorites": count[:, EventType.FAVORITE],
        "own_carts": count[:, EventType.CART],
        "own_purchases": bought,
        "own_returns": count[:, EventType.RETURN],
        "own_purchase_days": purchase_days,
        "own_purchase_share": bought / max(float(all_bought.sum()), 1.0),
        "own_purchases_to_top": bought / max(float(all_bought.max()), 1.0),
        "own_days_since_action": _days(user.as_of_us, user.pair_last_us[row], known),
        "own_days_since_purchase": since_purchase,
        "own_days_since_first": since_first,
        "own_days_behind_last_order": behind,
        "own_in_last_order": np.where(had, behind < 1.0, np.nan).astype(np.float32),
        "own_gap_days": gap,
        "own_gap_ratio": gap_ratio.astype(np.float32),
        "own_user_gap_ratio": since_purchase / np.float32(max(orders.gap_days, 0.5)),
        "own_order_share": purchase_days / np.float32(max(len(orders.days), 1)),
        "own_orders_since": np.where(had, len(orders.days) - orders_until, np.nan).astype(np.float32),
        "own_steps_back": np.where(seen, step[at] if len(step) else 0, np.nan),
        "own_recent_actions": np.where(seen, within[at], 0),
        "own_quantity_level": level,
        "own_last_quantity_level": last_level,
        "own_total_quantity_level": level + total,
        "own_quantity_to_user": level - np.float32(user.values.get("quantity_level", np.nan)),
        "own_supply_ratio": supply_ratio.astype(np.float32),
    }


def _user(user: UserFeatures, orders: _Orders) -> dict[str, Floats | float]:
    """Scalars of the user, the same for every candidate."""
    bought = int((user.pair_count[:, EventType.PURCHASE] > 0).sum())
    return {
        **{f"user_{n}": user.values.get(n, np.nan) for n in USER_VALUES},
        "user_days_since_order": orders.since_days,
        "user_order_gap_days": orders.gap_days,
        "user_repeat_rate": float((user.pair_purchase_days > 1).sum()) / bought if bought else np.nan,
    }


def _sources(user: UserFeatures, found: Candidates) -> dict[str, Floats | float]:
    """What every source says: its score, and 1 / (1 + position by it) among these candidates, 0 where it is silent.

    What the user has touched and what is new count apart: a new item is told the same whether or not the request
    wants the others too.
    """
    acted = user.pair_count[:, EventType.VIEW :].any(axis=1)
    fresh = ~np.isin(found.item_key, user.pair_item_key[acted])
    columns: dict[str, Floats | float] = {}
    for name in SOURCES:
        columns[f"{name}_score"] = found.score(name)
        columns[f"{name}_reciprocal_rank"] = np.nan_to_num(1.0 / (1.0 + found.positions(name, fresh)))
    bits = found.source_bits[:, None] >> np.arange(len(found.source_names), dtype=np.uint32)
    return {**columns, "num_sources": (bits & 1).sum(axis=1).astype(np.float32)}


def _items(user: UserFeatures, items: ItemFeatures, list_price: Floats) -> dict[str, Floats | float]:
    """Item features of the store; the price (the list price where it has none) and how many are bought at once, both
    beside what the user is used to.
    """
    place = {n: i for i, n in enumerate(items.names)}
    price = items.values[:, place["price"]]
    price = np.where(np.isnan(price), list_price, price)
    return {
        **{f"item_{n}": items.values[:, place[n]] for n in ITEM_VALUES},
        "item_price_to_user": np.log(np.maximum(price, 1.0)) - np.float32(user.values.get("price_level", np.nan)),
        "item_quantity_to_user": items.values[:, place["quantity_level"]]
        - np.float32(user.values.get("quantity_level", np.nan)),
    }


def _relations(
    query: Query, user: UserFeatures, item_key: npt.NDArray[np.int64], catalogue: Catalogue
) -> dict[str, Floats | float]:
    """How each candidate stands to the categories and brands of the user's recent actions, the screen and the cart."""
    category, recent = catalogue.category(item_key), catalogue.category(user.recent_item_key)
    affinity, last_at = _share(category, recent)
    since = np.where(last_at >= 0, (user.as_of_us - np.append(user.recent_time_us, 0)[last_at]) / DAY_US, np.nan)
    return {
        "category_affinity": affinity,
        "brand_affinity": _share(catalogue.brand(item_key), catalogue.brand(user.recent_item_key))[0],
        "category_days_since": since,
        "same_category_as_current": _same(category, catalogue, [query.current_item] if query.current_item else []),
        "same_category_as_cart": _same(category, catalogue, query.cart),
    }


def _titles(user: UserFeatures, item_key: npt.NDArray[np.int64], titles: Titles | None) -> dict[str, Floats | float]:
    """Cosines of each candidate's title and those of the newest actions; NaN without a title on either side."""
    if titles is None or not len(user.recent_item_key):
        return dict.fromkeys(TITLE_NAMES, np.nan)
    candidate, past = titles.of(item_key), titles.of(user.recent_item_key[-_TITLES_BACK:])
    past = past[past.any(axis=1)]
    if not len(past):
        return dict.fromkeys(TITLE_NAMES, np.nan)
    like = candidate @ past.T
    like[~candidate.any(axis=1)] = np.nan
    fading = _TITLE_FADING ** np.arange(len(past), dtype=np.float32)[::-1]
    nearest = np.sort(like, axis=1)[:, -3:]
    return {
        "title_like_last": like[:, -1],
        "title_like_closest": nearest[:, -1],
        "title_like_closest_3": nearest.mean(axis=1),
        "title_like_mean": like.mean(axis=1),
        "title_like_recent": like @ (fading / fading.sum()),
    }


def _share(code: npt.NDArray[np.int32], past: npt.NDArray[np.int32]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Share of the past actions with each code [N], NaN = no code; position of the newest such action, -1 = none."""
    size = int(max(code.max(initial=0), past.max(initial=0))) + 1
    valid = past[past != UNKNOWN]
    count = np.append(np.bincount(valid, minlength=size), 0)
    newest = np.full(size + 1, -1, np.int64)
    newest[past] = np.arange(len(past))  # later assignments win; UNKNOWN (-1) writes the spare last entry
    newest[UNKNOWN] = -1
    share = np.where(code == UNKNOWN, np.nan, count[code] / max(len(valid), 1))
    return share.astype(np.float32), newest[code]


def _same(category: npt.NDArray[np.int32], catalogue: Catalogue, ids: list[str] | tuple[str, ...]) -> Floats | float:
    if not ids:
        return np.nan
    other = catalogue.category(keys(ids))
    return np.isin(category, other[other != UNKNOWN]).astype(np.float32)


def _lookup(
    key: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Row of each wanted key in `key` (any order, distinct), 0 where it is not there, and whether it is."""
    order = np.argsort(key)
    row = find_rows(key[order], wanted, order)
    return np.maximum(row, 0), row >= 0


def _days(as_of_us: int, then_us: npt.NDArray[np.int64], known: npt.NDArray[np.bool_]) -> Floats:
    return np.where(known, (as_of_us - then_us) / DAY_US, np.nan).astype(np.float32)
