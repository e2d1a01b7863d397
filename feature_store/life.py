"""One row per behaviour for ever: how often, first and last time, and the prices seen. Part of users and items alike.

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
    ),
)


def life_rows(code: Words, events: EventColumns) -> NewRows:
    """What N actions add to `life`."""
    priced = events.price > 0
    price = np.where(priced, events.price, 0)
    log_price = np.rint(np.log2(np.maximum(price, 1)) * LOG_PRICE_UNIT).astype(np.int64)
    time = events.time_us
    return NewRows.of(code, events.event_type, 1, time, time, priced.astype(np.int64), price, log_price)


def dense(rows: Rows, column: str, missing: int = 0) -> npt.NDArray[np.int64]:
    """One column of `life` by EventType [E, 7]."""
    out = np.full((len(rows.offsets) - 1, NUM_TYPES), missing, np.int64)
    out[rows.owner, rows["event_type"]] = rows[column]
    return out
