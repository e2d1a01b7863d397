"""Forgetting a user: the state goes, a tombstone stays, and older events stay out for good.

A forget event is the one exception to "state is a function of the set of events": what it deletes is deleted, also
what was newer, because sums of a bucket cannot be taken apart. Item aggregates are not rewritten.

Shape legend: N events, E users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.fold import merge
from feature_store.state import Rows, State, Table
from recsys.core import EventKind

FORGOTTEN = Table(name="forgotten", key=("time_us",), keep=(1,), group_shift=63)


@dataclass(frozen=True, slots=True)
class Screened:
    """keep [N]: events that are not behind a tombstone. cleared [E]: users to be deleted first. forgotten: the new
    tombstones.
    """

    keep: npt.NDArray[np.bool_]
    cleared: npt.NDArray[np.bool_]
    forgotten: Rows


def screen(events: EventColumns, forgotten: Rows) -> Screened:
    """Apply the forget events of a batch, in arrival order, and every tombstone of its users."""
    num_users = len(forgotten.offsets) - 1
    until = np.full(num_users, -1, np.int64)
    until[forgotten.owner] = forgotten["time_us"]
    cleared = np.zeros(num_users, np.bool_)
    cleared_at = np.full(num_users, -1, np.int64)
    is_forget = events.kind == EventKind.FORGET
    for row in np.flatnonzero(is_forget & (events.user_code >= 0)):  # rare: people who ask to be forgotten
        user, time_us = events.user_code[row], events.time_us[row]
        if time_us > until[user]:
            until[user], cleared[user], cleared_at[user] = time_us, True, row
    user = events.user_code
    has_user = user >= 0
    behind = np.zeros(len(events), np.bool_)
    if num_users:
        behind = has_user & ((events.time_us <= until[user]) | (np.arange(len(events)) < cleared_at[user]))
    new = NewRows.of(np.flatnonzero(cleared), until[cleared])
    return Screened(~behind & ~is_forget, cleared, merge(forgotten, new))


def clear(state: State, cleared: npt.NDArray[np.bool_]) -> State:
    """The state without any row of the users to be deleted; cleared [E]."""
    if not cleared.any():
        return state
    return State({name: rows.where(~cleared[rows.owner]) for name, rows in state.rows.items()})
