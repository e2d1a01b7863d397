"""Item view: how often it is shown, viewed, bought; its trend, price, discount, stock, whether it is listed, its age.

Shape legend: N events, E items, F features, B behaviours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.life import LIFE, dense, life_rows
from feature_store.state import Op, State, Table, Words
from feature_store.view import FeatureView
from feature_store.windows import BEHAVIOURS, BUCKETS, DAY_US, DECAYS, WINDOWS, BucketReader, bucket_rows, ratio
from recsys.core import EventKind, EventType

# Fields of `latest`. FIRST_PRICE runs on reversed time, so that the earliest wins.
_PRICE, _FIRST_PRICE, _STOCK, _LISTED, _SEEN_PRICE = range(5)
_NUM_FIELDS = 5
_TIME_END_US = 1 << 62
LATEST = Table(
    name="latest",
    key=("field", "time_us", "event_key"),
    values=(("value", Op.MAX),),
    keep=(1,) * _NUM_FIELDS,
)

_TRENDED = (EventType.VIEW, EventType.CART, EventType.PURCHASE)
_COUNTS = tuple(f"{b.label}_count_{w}" for w in (*(w.name for w in WINDOWS), "all") for b in BEHAVIOURS)
_TRENDS = tuple(f"{b.label}_trend_{d.name}" for d in DECAYS for b in _TRENDED)
_RECENCY = tuple(f"days_since_{b.label}" for b in _TRENDED)
_RATES = ("view_rate_30d", "purchase_rate_30d")
_CATALOG = ("price", "price_usual", "discount_first", "discount_usual", "stock", "listed", "age_days")


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
    known = NewRows.of(catalog.item_code, 0, 0, catalog.time_us, catalog.time_us, 0, 0, 0)
    return {
        "life": NewRows.concat([life_rows(actions.item_code, actions), known]),
        "buckets": bucket_rows(actions.item_code, actions),
        "latest": NewRows.concat(latest),
    }


def _latest(events: EventColumns, field: int, value: Words) -> NewRows:
    said = value >= 0
    events = events.where(said)
    time = _TIME_END_US - events.time_us if field == _FIRST_PRICE else events.time_us
    return NewRows.of(events.item_code, field, time, events.event_key, value[said])


def _values(state: State, as_of_us: int) -> tuple[npt.NDArray[np.float64], Words]:
    life, latest = state["life"], state["latest"]
    reader = BucketReader(state["buckets"], as_of_us)
    count, last = dense(life, "count"), dense(life, "last_us", -1)
    windows = {w.name: reader.window(w) for w in WINDOWS}
    trends = [reader.decayed(d, _TRENDED) for d in DECAYS]
    last_T = last[:, list(_TRENDED)]
    recency = np.where(last_T >= 0, np.maximum(as_of_us - last_T, 0) / DAY_US, np.nan)
    shown, viewed, bought = (
        windows["30d"][:, t - 1] for t in (EventType.IMPRESSION, EventType.VIEW, EventType.PURCHASE)
    )
    rates = [ratio(viewed, shown), ratio(bought, viewed)]
    field = np.full((len(count), _NUM_FIELDS), np.nan)
    field_us = np.zeros((len(count), _NUM_FIELDS), np.int64)
    field[latest.owner, latest["field"]] = latest["value"]
    field_us[latest.owner, latest["field"]] = latest["time_us"]
    price = np.where(np.isnan(field[:, _PRICE]), field[:, _SEEN_PRICE], field[:, _PRICE])
    price_us = np.where(np.isnan(field[:, _PRICE]), field_us[:, _SEEN_PRICE], field_us[:, _PRICE])
    usual = ratio(dense(life, "price_sum").sum(axis=1), dense(life, "priced").sum(axis=1))
    first_us = dense(life, "first_us", np.iinfo(np.int64).max).min(axis=1)
    catalog = (
        price,
        usual,
        _discount(price, field[:, _FIRST_PRICE]),
        _discount(price, usual),
        field[:, _STOCK],
        field[:, _LISTED],
        np.maximum(as_of_us - first_us, 0) / DAY_US,
    )
    number = np.concatenate(
        [*windows.values(), count[:, 1:], *trends, recency, np.stack([*rates, *catalog], axis=1)], axis=1
    )
    time = np.maximum(last, 0)
    newest = time.max(axis=1)
    other = [newest, newest, price_us, newest, price_us, price_us, field_us[:, _STOCK], field_us[:, _LISTED], newest]
    times = [*[time[:, 1:]] * (len(WINDOWS) + 1), *[time[:, list(_TRENDED)]] * 3, np.stack(other, axis=1)]
    return number, np.concatenate(times, axis=1)


def _discount(price: npt.NDArray[np.float64], reference: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 - price / reference: 0.3 = 30 % below it; NaN where either is unknown."""
    return np.asarray(1.0 - ratio(price, reference))


ITEM_VIEW = FeatureView(
    name="item",
    version=1,
    kind="item",
    tables=(LIFE, BUCKETS, LATEST),
    rows=_rows,
    features=(*_COUNTS, *_TRENDS, *_RECENCY, *_RATES, *_CATALOG),
    values=_values,
)
