"""User view: what a shopper did lately, how much, how recently, at which prices and hours, in which categories.

Shape legend: N events, E users, F features, B behaviours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.life import LIFE, LOG_PRICE_UNIT, dense, life_rows
from feature_store.state import Op, Rows, State, Table, Words
from feature_store.view import FeatureView
from feature_store.windows import (
    BEHAVIOURS,
    BUCKETS,
    COUNT_WORDS,
    DAY_US,
    WINDOWS,
    BucketReader,
    bucket_rows,
    counted,
    counts,
    ratio,
)
from recsys.core import EventType

_MONTH_US = 30 * DAY_US
_CATEGORY, _BRAND = 0, 1

RECENT = Table(
    name="recent",
    key=("event_type", "time_us", "event_key"),
    values=(("item_key", Op.MAX),),
    # none, impression, view, favorite, cart, purchase, return
    keep=(0, 0, 200, 64, 100, 200, 32),
)
AFFINITY = Table(
    name="affinity",
    key=("month_kind", "key"),  # 2 * month + (0 category, 1 brand): the newest months stay
    values=COUNT_WORDS,
    keep=(128,),
    group_shift=63,
)

_COUNTS = tuple(f"{b.label}_count_{w}" for w in (*(w.name for w in WINDOWS), "all") for b in BEHAVIOURS)
_RECENCY = tuple(f"days_since_{b.label}" for b in BEHAVIOURS[1:])
_OTHER = (
    "days_since_any",
    "age_days",
    "price_level",
    "purchase_price_mean",
    "hour_share",
    "num_categories",
    "category_top_share",
    "num_brands",
    "brand_top_share",
)


def _rows(events: EventColumns) -> dict[str, NewRows]:
    events = events.where(events.is_action)
    acted = events.where(events.event_type != EventType.IMPRESSION)
    return {
        "life": life_rows(events.user_code, events),
        "buckets": bucket_rows(events.user_code, events),
        "recent": NewRows.of(acted.user_code, acted.event_type, acted.time_us, acted.event_key, acted.item_key),
        "affinity": NewRows.concat(
            _affinity(acted, kind, ids) for kind, ids in ((_CATEGORY, acted.category), (_BRAND, acted.brand))
        ),
    }


def _affinity(events: EventColumns, kind: int, ids: Words) -> NewRows:
    said = ids >= 0
    events = events.where(said)
    month = events.time_us // _MONTH_US
    return NewRows.of(events.user_code, 2 * month + kind, ids[said], *counted(events.event_type))


def _values(state: State, as_of_us: int) -> tuple[npt.NDArray[np.float64], Words]:
    life = state["life"]
    reader = BucketReader(state["buckets"], as_of_us)
    count, last = dense(life, "count"), dense(life, "last_us", -1)
    first = dense(life, "first_us", np.iinfo(np.int64).max)[:, 1:].min(axis=1)
    any_last = last[:, 2:].max(axis=1)
    recency = np.where(last[:, 2:] >= 0, np.maximum(as_of_us - last[:, 2:], 0) / DAY_US, np.nan)
    priced = dense(life, "priced")
    bought = int(EventType.PURCHASE)
    mean_log2 = ratio(dense(life, "log_price_sum").sum(axis=1), priced.sum(axis=1)) / LOG_PRICE_UNIT
    other = (
        np.where(any_last >= 0, np.maximum(as_of_us - any_last, 0) / DAY_US, np.nan),
        np.maximum(as_of_us - first, 0) / DAY_US,
        mean_log2 * np.log(2.0),  # price_level: mean natural logarithm of the prices of all actions
        ratio(dense(life, "price_sum")[:, bought], priced[:, bought]),
        reader.hour_of_day(),
        *_shares(state["affinity"], _CATEGORY),
        *_shares(state["affinity"], _BRAND),
    )
    windows = [reader.window(w) for w in WINDOWS]
    number = np.concatenate([*windows, count[:, 1:], recency, np.stack(other, axis=1)], axis=1)
    time = np.maximum(last, 0)
    newest = np.maximum(time.max(axis=1), 0)
    times = [*[time[:, 1:]] * (len(WINDOWS) + 1), time[:, 2:], np.repeat(newest[:, None], len(_OTHER), axis=1)]
    return number, np.concatenate(times, axis=1)


def _shares(affinity: Rows, kind: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Number of distinct categories (or brands) and the share of the most frequent one, per user; NaN without any."""
    num_entities = len(affinity.offsets) - 1
    number, share = np.full(num_entities, np.nan), np.full(num_entities, np.nan)
    chosen = affinity.where(affinity["month_kind"] % 2 == kind)
    if not len(chosen.words):
        return number, share
    acted = counts(chosen)[:, 1:].sum(axis=1).astype(np.int64)
    owner = chosen.owner
    order = np.lexsort((chosen["key"], owner))
    owner, key, acted = owner[order], chosen["key"][order], acted[order]
    starts = np.flatnonzero(np.append(True, (owner[1:] != owner[:-1]) | (key[1:] != key[:-1])))
    per_key, who = np.add.reduceat(acted, starts), owner[starts]
    present = np.unique(who)
    first = np.searchsorted(who, present)
    number[present] = np.diff(np.append(first, len(who)))
    share[present] = np.maximum.reduceat(per_key, first) / np.add.reduceat(per_key, first)
    return number, share


USER_VIEW = FeatureView(
    name="user",
    version=1,
    kind="user",
    tables=(LIFE, BUCKETS, RECENT, AFFINITY),
    rows=_rows,
    features=(*_COUNTS, *_RECENCY, *_OTHER),
    values=_values,
)
