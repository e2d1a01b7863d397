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
from feature_store.state import Op, Rows, State, Table, Words
from feature_store.view import FeatureView
from feature_store.windows import COUNT_WORDS, DAY_US, counted
from recsys.core import EventType

PAIRS = Table(
    name="pairs",
    key=("day", "item_key"),
    # Microseconds into the day; the purchase's plus one, 0 = none.
    values=(("first", Op.MIN), ("last", Op.MAX), ("last_purchase", Op.MAX), *COUNT_WORDS),
    keep=(1024,),
    group_shift=63,
    codes=("u2", "u8", "u5", "u5", "u5", "2u1", "2u1", "2u1"),
)


def _rows(events: EventColumns) -> dict[str, NewRows]:
    acted = events.where(events.is_action & (events.event_type != EventType.IMPRESSION))
    day = acted.time_us // DAY_US
    time = acted.time_us - day * DAY_US
    bought = np.where(acted.event_type == EventType.PURCHASE, time + 1, 0)
    rows = NewRows.of(acted.user_code, day, acted.item_key, time, time, bought, *counted(acted.event_type))
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


def pairs_of(rows: Rows, as_of_us: int) -> Pairs:
    """The rows of one user grouped by item; days that begin at or after as_of are left out."""
    if int((rows["day"] * DAY_US + rows["first"]).max(initial=0)) >= as_of_us:
        rows = rows.where(rows["day"] * DAY_US + rows["first"] < as_of_us)
    if not len(rows.words):
        empty = np.empty(0, np.int64)
        return Pairs(empty, np.empty((0, 7), np.int32), empty, empty, empty, np.empty(0, np.int32))
    order = np.argsort(rows["item_key"], kind="stable")
    item_key, day_us = rows["item_key"][order], rows["day"][order] * DAY_US
    starts = np.flatnonzero(np.append(True, item_key[1:] != item_key[:-1]))
    bought = rows["last_purchase"][order]
    count = np.zeros((len(starts), 7), np.int32)
    packed = np.add.reduceat(rows.words.T[-len(COUNT_WORDS) :, order], starts, axis=1)
    count[:, 1:] = np.ascontiguousarray(packed.T).view(np.int32)
    return Pairs(
        item_key[starts],
        count,
        np.minimum.reduceat(day_us + rows["first"][order], starts),
        np.maximum.reduceat(day_us + rows["last"][order], starts),
        np.maximum.reduceat(np.where(bought > 0, day_us + bought - 1, 0), starts),
        np.add.reduceat((bought > 0).astype(np.int32), starts),
    )


def _values(state: State, _as_of_us: int) -> npt.NDArray[np.float64]:
    rows = state["pairs"]
    num_users = len(rows.offsets) - 1
    distinct = np.zeros((num_users, 2))
    if len(rows.words):
        owner, item_key = rows.owner, rows["item_key"]
        order = np.lexsort((item_key, owner))
        owner_O, item_O = owner[order], item_key[order]
        first = np.append(True, (owner_O[1:] != owner_O[:-1]) | (item_O[1:] != item_O[:-1]))
        distinct[:, 0] = np.bincount(owner_O[first], minlength=num_users)
        # Rows are sorted by day: a day counts once, if any of its rows was bought.
        bought = np.flatnonzero(rows["last_purchase"])
        owner, day = owner[bought], rows["day"][bought]
        first = np.append(True, (owner[1:] != owner[:-1]) | (day[1:] != day[:-1]))[: len(bought)]
        distinct[:, 1] = np.bincount(owner[first], minlength=num_users)
    return distinct


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
