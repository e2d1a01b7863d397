"""User view: what a shopper did lately, how much, how recently, at which prices and hours, in which categories.

Shape legend: N events, E users, F features, B behaviours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.compiled import values
from feature_store.life import LIFE, LOG_PRICE_UNIT, LOG_QUANTITY_UNIT, dense, life_rows
from feature_store.state import Op, State, Table, Words
from feature_store.view import FeatureView
from feature_store.windows import (
    BEHAVIOURS,
    BUCKETS,
    COUNT_WORDS,
    DAY_US,
    HOUR_OF_DAY,
    HOUR_US,
    KIND_SHIFT,
    WINDOWS,
    bucket_rows,
    counted,
    edges,
)
from recsys.core import EventType

_MONTH_US = 30 * DAY_US
_CATEGORY, _BRAND = 0, 1
_LOG_2 = float(np.log(2.0))

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
    "price_level",  # mean natural logarithm of the prices of all actions
    "purchase_price_mean",
    "hour_share",
    "num_categories",
    "category_top_share",
    "num_brands",
    "brand_top_share",
    "quantity_level",  # mean natural logarithm of the quantities of purchases
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
    at, life, buckets, affinity = edges(as_of_us), state["life"], state["buckets"], state["affinity"]
    out = np.empty((len(state), len(USER_VIEW.features)))
    values.user_values(
        life.offsets, life.columns, buckets.offsets, buckets.columns, affinity.offsets, affinity.columns, as_of_us,
        at.first_W, at.end_W, HOUR_OF_DAY, KIND_SHIFT, HOUR_US, DAY_US, LOG_PRICE_UNIT, LOG_QUANTITY_UNIT, _LOG_2,
        out,
    )  # fmt: skip
    return out


def _times(state: State) -> Words:
    last = np.maximum(dense(state["life"])["last_us"], 0)
    newest = np.repeat(last.max(axis=1)[:, None], len(_OTHER), axis=1)
    return np.concatenate([*[last[:, 1:]] * (len(WINDOWS) + 1), last[:, 2:], newest], axis=1)


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
