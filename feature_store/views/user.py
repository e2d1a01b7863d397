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
    codes=("u1", "u7", "u8", "u8"),
)
AFFINITY = Table(
    name="affinity",
    key=("month_kind", "key"),  # 2 * month + (0 category, 1 brand): the newest months stay
    values=COUNT_WORDS,
    keep=(128,),
    group_shift=63,
    codes=("u2", "u8", "2u2", "2u2", "2u2"),
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
        "buckets": bucket_rows(events.user_code, events, hour_of_day=True),
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


def _values(state: State, as_of_us: int) -> npt.NDArray[np.float64]:
    life = dense(state["life"])
    reader = BucketReader(state["buckets"], as_of_us)
    last, priced, bought = life["last_us"], life["priced"], int(EventType.PURCHASE)
    first = life["first_us"][:, 1:].min(axis=1)
    recency = np.where(last[:, 2:] >= 0, np.maximum(as_of_us - last[:, 2:], 0) / DAY_US, np.nan)
    mean_log2 = ratio(life["log_price_sum"].sum(axis=1), priced.sum(axis=1)) / LOG_PRICE_UNIT
    other = (
        np.fmin.reduce(recency, axis=1),
        np.maximum(as_of_us - first, 0) / DAY_US,
        mean_log2 * np.log(2.0),  # price_level: mean natural logarithm of the prices of all actions
        ratio(life["price_sum"][:, bought], priced[:, bought]),
        reader.hour_of_day(),
    )
    parts = (reader.windows(), life["count"][:, 1:], recency, np.stack(other, axis=1), _shares(state["affinity"]))
    return np.concatenate(parts, axis=1)


def _times(state: State) -> Words:
    last = np.maximum(dense(state["life"])["last_us"], 0)
    newest = np.repeat(last.max(axis=1)[:, None], len(_OTHER), axis=1)
    return np.concatenate([*[last[:, 1:]] * (len(WINDOWS) + 1), last[:, 2:], newest], axis=1)


def _shares(affinity: Rows) -> npt.NDArray[np.float64]:
    """Per user [E, 4]: number of distinct categories, share of the most frequent one, the same of brands; NaN without
    any.
    """
    out = np.full((2 * (len(affinity.offsets) - 1), 2), np.nan)  # by user and kind
    if not len(affinity.words):
        return out.reshape(-1, 4)
    acted = counts(affinity)[:, 1:].sum(axis=1)
    group, key = 2 * affinity.owner + affinity["month_kind"] % 2, affinity["key"]
    order = np.lexsort((key, group))
    group, key = group[order], key[order]
    starts = np.flatnonzero(np.append(True, (group[1:] != group[:-1]) | (key[1:] != key[:-1])))
    per_key, who = np.add.reduceat(acted[order], starts), group[starts]
    first = np.flatnonzero(np.append(True, who[1:] != who[:-1]))
    out[who[first], 0] = np.diff(np.append(first, len(who)))
    out[who[first], 1] = np.maximum.reduceat(per_key, first) / np.add.reduceat(per_key, first)
    return out.reshape(-1, 4)


USER_VIEW = FeatureView(
    name="user",
    version=2,
    kind="user",
    tables=(LIFE, BUCKETS, RECENT, AFFINITY),
    rows=_rows,
    features=(*_COUNTS, *_RECENCY, *_OTHER),
    values=_values,
    times=_times,
)
