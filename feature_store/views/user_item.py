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
from feature_store.windows import COUNT_WORDS, DAY_US, counted, counts
from recsys.core import EventType

PAIRS = Table(
    name="pairs",
    key=("day", "item_key"),
    values=(("first_us", Op.MIN), ("last_us", Op.MAX), ("last_purchase_us", Op.MAX), *COUNT_WORDS),
    keep=(1024,),
    group_shift=63,
)


def _rows(events: EventColumns) -> dict[str, NewRows]:
    acted = events.where(events.is_action & (events.event_type != EventType.IMPRESSION))
    time = acted.time_us
    bought = np.where(acted.event_type == EventType.PURCHASE, time, 0)
    rows = NewRows.of(acted.user_code, time // DAY_US, acted.item_key, time, time, bought, *counted(acted.event_type))
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
    rows = rows.where(rows["first_us"] < as_of_us)
    order = np.argsort(rows["item_key"], kind="stable")
    words, item_key = rows.words[order], rows["item_key"][order]
    if not len(words):
        empty = np.empty(0, np.int64)
        return Pairs(empty, np.empty((0, 7), np.int32), empty, empty, empty, np.empty(0, np.int32))
    starts = np.flatnonzero(np.append(True, item_key[1:] != item_key[:-1]))
    count_R6 = counts(rows)[order]
    count = np.zeros((len(starts), 7), np.int32)
    count[:, 1:] = np.add.reduceat(count_R6, starts, axis=0)
    bought = (count_R6[:, EventType.PURCHASE - 1] > 0).astype(np.int32)
    columns = {name: words[:, c] for c, name in enumerate(rows.table.columns)}
    return Pairs(
        item_key[starts],
        count,
        np.minimum.reduceat(columns["first_us"], starts),
        np.maximum.reduceat(columns["last_us"], starts),
        np.maximum.reduceat(columns["last_purchase_us"], starts),
        np.add.reduceat(bought, starts),
    )


def _values(state: State, _as_of_us: int) -> tuple[npt.NDArray[np.float64], Words]:
    rows = state["pairs"]
    num_users = len(rows.offsets) - 1
    owner, item_key = rows.owner, rows["item_key"]
    distinct = np.zeros((num_users, 2))
    if len(owner):
        order = np.lexsort((item_key, owner))
        first = np.append(True, (owner[order][1:] != owner[order][:-1]) | (np.diff(item_key[order]) != 0))
        distinct[:, 0] = np.bincount(owner[order][first], minlength=num_users)
        bought = counts(rows)[:, EventType.PURCHASE - 1] > 0
        new_day = np.append(True, (owner[1:] != owner[:-1]) | (np.diff(rows["day"]) != 0))
        # Rows are sorted by day: a day counts once, if any of its rows was bought.
        day = np.cumsum(new_day) - 1
        bought_day = np.bincount(day, weights=bought) > 0
        distinct[:, 1] = np.bincount(owner[new_day], weights=bought_day, minlength=num_users)
    newest = np.zeros(num_users, np.int64)
    np.maximum.at(newest, owner, rows["last_us"])
    return distinct, np.repeat(newest[:, None], 2, axis=1)


USER_ITEM_VIEW = FeatureView(
    name="user_item",
    version=1,
    kind="user",
    tables=(PAIRS,),
    rows=_rows,
    features=("num_items_touched", "num_purchase_days"),
    values=_values,
)
