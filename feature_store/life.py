"""One row per behaviour for ever: how often, first and last time, prices and quantities. Part of users and items alike.

Shape legend: N events, E entities, R rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.state import Op, Rows, Table, Words
from recsys.core import EventType

NUM_TYPES = len(EventType)
LOG_PRICE_UNIT = 1024  # log2 prices are kept as integers of 1/1024, so that sums do not depend on their order
LOG_QUANTITY_UNIT = 8  # log2 quantities likewise, of 1/8: what is kept of them has a byte per user, item and day
LIFE = Table(
    name="life",
    key=("event_type",),
    values=(
        ("count", Op.ADD),
        ("first_us", Op.MIN),
        ("last_us", Op.MAX),
        ("priced", Op.ADD),
        ("price_sum", Op.ADD),
        ("log_price_sum", Op.ADD),
        ("log_quantity_sum", Op.ADD),
    ),
    codes=("u1", "u4", "u7", "u7", "u4", "u8", "u6", "u3"),
)


def life_rows(code: Words, events: EventColumns) -> NewRows:
    """What N actions add to `life`."""
    priced = events.price > 0
    price = np.where(priced, events.price, 0)
    log_price = np.rint(np.log2(np.maximum(price, 1)) * LOG_PRICE_UNIT).astype(np.int64)
    time = events.time_us
    return NewRows.of(
        code, events.event_type, 1, time, time, priced.astype(np.int64), price, log_price, log_quantity(events)
    )


def log_quantity(events: EventColumns) -> Words:
    """log2 of how many pieces each event is of [N], in units of 1 / LOG_QUANTITY_UNIT; one where it does not say."""
    log: Words = np.rint(np.log2(np.maximum(events.quantity, 1)) * LOG_QUANTITY_UNIT).astype(np.int64)
    return log


NEVER_US = np.iinfo(np.int64).max
_MISSING = {"first_us": NEVER_US, "last_us": -1}


def dense(rows: Rows) -> dict[str, npt.NDArray[np.int64]]:
    """Every column of `life` by EventType [E, 7]; without a row first_us is NEVER_US, last_us -1, all others 0."""
    names = rows.table.columns[1:]
    out = np.empty((len(names), len(rows.offsets) - 1, NUM_TYPES), np.int64)
    for c, name in enumerate(names):
        out[c] = _MISSING.get(name, 0)
    out[:, rows.owner, rows.words[:, 0]] = rows.words.T[1:]
    return dict(zip(names, out, strict=True))
