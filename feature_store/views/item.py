"""Item view: how often it is shown, viewed, bought; its trend, price, discount, stock, whether it is listed, its age.

Shape legend: N events, E items, F features, B behaviours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.compiled import values
from feature_store.life import LIFE, LOG_QUANTITY_UNIT, dense, life_rows
from feature_store.state import Op, Rows, State, Table, Words
from feature_store.view import FeatureView
from feature_store.windows import BEHAVIOURS, BUCKETS, DAY_US, DECAYS, WEIGHT_UNIT, WINDOWS, bucket_rows, edges
from recsys.core import EventKind, EventType

# Fields of `latest`. FIRST_PRICE runs on reversed time, so that the earliest wins.
_PRICE, _FIRST_PRICE, _STOCK, _LISTED, _SEEN_PRICE = range(5)
_NUM_FIELDS = 5
_TIME_END_US = 1 << 55
_LOG_2 = float(np.log(2.0))
LATEST = Table(
    name="latest",
    key=("field", "time_us", "event_key"),
    values=(("value", Op.MAX),),
    keep=(1,) * _NUM_FIELDS,
    codes=("u1", "u7", "u8", "u8"),
)

_TRENDED = [EventType.VIEW, EventType.CART, EventType.PURCHASE]
_COUNTS = tuple(f"{b.label}_count_{w}" for w in (*(w.name for w in WINDOWS), "all") for b in BEHAVIOURS)
_TRENDS = tuple(f"{b.label}_trend_{d.name}" for d in DECAYS for b in _TRENDED)
_RECENCY = tuple(f"days_since_{b.label}" for b in _TRENDED)
_RATES = ("view_rate_30d", "purchase_rate_30d")
_OTHER = ("price", "price_usual", "discount_first", "discount_usual", "stock", "listed", "age_days", "quantity_level")


def _rows(events: EventColumns) -> dict[str, NewRows]:
    actions = events.where(events.is_action)
    catalog = events.where((events.kind != EventKind.ACTION) & (events.item_code >= 0))
    latest = [
        _latest(catalog, _PRICE, catalog.price),
        _latest(catalog, _FIRST_PRICE, catalog.price),
        _latest(catalog, _STOCK, catalog.stock),
        _latest(catalog, _LISTED, catalog.listed),
        _latest(actions, _SEEN_PRICE, np.where(actions.price > 0, actions.price, -1)),
    ]
    # A row of type 0 says that the catalogue knows the item; it counts nothing, so a repeat changes nothing.
    known = NewRows.of(catalog.item_code, 0, 0, catalog.time_us, catalog.time_us, 0, 0, 0, 0)
    return {
        "life": NewRows.concat([life_rows(actions.item_code, actions), known]),
        "buckets": bucket_rows(actions.item_code, actions, hour_of_day=False),
        "latest": NewRows.concat(latest),
    }


def _latest(events: EventColumns, field: int, value: Words) -> NewRows:
    said = value >= 0
    events = events.where(said)
    time = _TIME_END_US - events.time_us if field == _FIRST_PRICE else events.time_us
    return NewRows.of(events.item_code, field, time, events.event_key, value[said])


def _values(state: State, as_of_us: int) -> npt.NDArray[np.float64]:
    at, life, buckets, latest = edges(as_of_us), state["life"], state["buckets"], state["latest"]
    out = np.empty((len(state), len(ITEM_VIEW.features)))
    values.item_values(
        life.offsets, life.columns, buckets.offsets, buckets.columns, latest.offsets, latest.columns, as_of_us,
        at.first_W, at.end_W, at.window_D, at.weight_DA, WEIGHT_UNIT, DAY_US, LOG_QUANTITY_UNIT, _LOG_2, out,
    )  # fmt: skip
    return out


def _times(state: State) -> Words:
    field, field_us = _fields(state["latest"])
    last = np.maximum(dense(state["life"])["last_us"], 0)
    newest = last.max(axis=1)
    price = np.where(np.isnan(field[:, _PRICE]), field_us[:, _SEEN_PRICE], field_us[:, _PRICE])
    stock, listed, bought = field_us[:, _STOCK], field_us[:, _LISTED], last[:, EventType.PURCHASE]
    single = (newest, newest, price, newest, price, price, stock, listed, newest, bought)
    times = [*[last[:, 1:]] * (len(WINDOWS) + 1), *[last[:, _TRENDED]] * (len(DECAYS) + 1), np.stack(single, axis=1)]
    return np.concatenate(times, axis=1)


def _fields(latest: Rows) -> tuple[npt.NDArray[np.float64], Words]:
    """Value, NaN = none, and time [E, fields] of what the catalogue says."""
    shape = (len(latest.offsets) - 1, _NUM_FIELDS)
    value, time_us = np.full(shape, np.nan), np.zeros(shape, np.int64)
    at = (latest.owner, latest["field"])
    value[at], time_us[at] = latest["value"], latest["time_us"]
    return value, time_us


ITEM_VIEW = FeatureView(
    name="item",
    version=2,
    kind="item",
    tables=(LIFE, BUCKETS, LATEST),
    rows=_rows,
    features=(*_COUNTS, *_TRENDS, *_RECENCY, *_RATES, *_OTHER),
    values=_values,
    times=_times,
)
