"""User x item view: what a shopper did with each item, inside the user's own state, by item and UTC day.

Rows are keyed by (day, item): the newest 1,024 stay. A day is a fixed bucket, so which rows stay does not depend on
the order in which events arrive.

Shape legend: N events, R rows, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.compiled import lists
from feature_store.life import LOG_QUANTITY_UNIT, log_quantity
from feature_store.state import Op, Rows, State, Table, Words
from feature_store.view import FeatureView
from feature_store.windows import COUNT_WORDS, DAY_US, counted
from recsys.core import EventType

PAIRS = Table(
    name="pairs",
    key=("day", "item_key"),
    # Microseconds into the day; the purchase's plus one, 0 = none.
    values=(("first", Op.MIN), ("last", Op.MAX), ("last_purchase", Op.MAX), *COUNT_WORDS, ("log_quantity_sum", Op.ADD)),
    keep=(1024,),
    group_shift=63,
    codes=("u2", "u8", "u5", "u5", "u5", "2u1", "2u1", "2u1", "u1"),
)


def _rows(events: EventColumns) -> dict[str, NewRows]:
    acted = events.where(events.is_action & (events.event_type != EventType.IMPRESSION))
    day = acted.time_us // DAY_US
    time = acted.time_us - day * DAY_US
    buys = acted.event_type == EventType.PURCHASE
    bought, quantity = np.where(buys, time + 1, 0), np.where(buys, log_quantity(acted), 0)
    rows = NewRows.of(acted.user_code, day, acted.item_key, time, time, bought, *counted(acted.event_type), quantity)
    return {"pairs": rows}


@dataclass(frozen=True, slots=True)
class Pairs:
    """All items one user acted on, by item key; see UserFeatures for the columns."""

    item_key: Words
    count: npt.NDArray[np.int32]
    first_us: Words
    last_us: Words
    last_purchase_us: Words
    purchase_days: npt.NDArray[np.int32]
    quantity_level: npt.NDArray[np.float32]
    last_quantity_level: npt.NDArray[np.float32]


def pairs_of(rows: Rows, as_of_us: int) -> Pairs:
    """The rows of one user grouped by item; days that begin at or after as_of are left out."""
    pairs, num = rows.columns, len(rows.words)
    count, days = np.zeros((num, 7), np.int32), np.zeros(num, np.int32)
    out, quantity = np.empty((4, num), np.int64), np.zeros((2, num), np.float32)
    order = np.argsort(pairs[1], kind="stable")
    n = lists.grouped_pairs(pairs, order, as_of_us, DAY_US, count, days, quantity, out)
    item_key, first_us, last_us, last_purchase_us = out[:, :n]
    total, last = quantity[:, :n] * np.float32(np.log(2.0) / LOG_QUANTITY_UNIT)
    bought = np.maximum(count[:n, EventType.PURCHASE], 1)
    return Pairs(
        item_key, count[:n], first_us, last_us, last_purchase_us, days[:n], (total / bought).astype(np.float32), last
    )


def _values(state: State, _as_of_us: int) -> npt.NDArray[np.float64]:
    pairs, out = state["pairs"], np.empty((len(state), 2))
    lists.pair_values(pairs.offsets, pairs.columns, out)
    return out


def _times(state: State) -> Words:
    rows = state["pairs"]
    newest = np.zeros(len(rows.offsets) - 1, np.int64)
    np.maximum.at(newest, rows.owner, rows["day"] * DAY_US + rows["last"])
    return np.repeat(newest[:, None], 2, axis=1)


USER_ITEM_VIEW = FeatureView(
    name="user_item",
    version=2,
    kind="user",
    tables=(PAIRS,),
    rows=_rows,
    features=("num_items_touched", "num_purchase_days"),
    values=_values,
    times=_times,
)
