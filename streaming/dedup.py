"""Each event once: which events of a batch are new, which are repeats, which come too late to be told apart.

Per user the store keeps the ids of events no older than the horizon behind the user's latest event, at most SEEN_MAX.
Id present: duplicate. Older than the horizon, or than the oldest id of a full list: late, because a repeat could no
longer be recognised. All others are applied, in whatever order they come.

Shape legend: N units (events, or slates), E users, R ids kept.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from feature_store.columns import NewRows
from feature_store.commit import SEEN_MAX
from feature_store.fold import merge
from feature_store.state import Rows, Words

_MIX = np.uint64(0x9E3779B97F4A7C15)  # spreads user numbers over 64 bits: 2 ** 64 / golden ratio


class Outcome(IntEnum):
    """What becomes of an event."""

    APPLIED = 0
    DUPLICATE = 1
    LATE = 2
    FORGOTTEN = 3


def classify(
    user: Words, time_us: Words, event_key: Words, seen: Rows, horizon_us: int
) -> tuple[npt.NDArray[np.int8], Rows]:
    """Outcome [N] of units in arrival order, and the ids to keep afterwards. user [N] are rows of `seen`.

    The horizon moves with each user's latest event so far, so the outcome does not depend on how records are batched.
    """
    outcome = np.zeros(len(user), np.int8)
    if not len(user):
        return outcome, seen
    stored = np.full(len(seen.offsets) - 1, -1, np.int64)
    some = seen.counts > 0
    stored[some] = seen["time_us"][seen.offsets[1:][some] - 1]
    late = time_us < _running_max(user, np.maximum(time_us, stored[user])) - horizon_us
    full = np.flatnonzero(seen.counts == SEEN_MAX)
    if len(full):
        floor_us, floor_key = (np.full(len(stored), -1, np.int64) for _ in range(2))
        floor_us[full], floor_key[full] = seen.words[seen.offsets[full]].T
        before = (time_us == floor_us[user]) & (event_key < floor_key[user])
        late |= (time_us < floor_us[user]) | before
    outcome[_repeated(user, event_key, seen)] = Outcome.DUPLICATE
    outcome[late] = Outcome.LATE  # also what is still kept: by the rules it was dropped before this unit came
    new = outcome == Outcome.APPLIED
    seen = merge(seen, NewRows.of(user[new], time_us[new], event_key[new]))
    latest = np.maximum.reduceat(np.append(seen["time_us"], -1), np.minimum(seen.offsets[:-1], len(seen.words)))
    return outcome, seen.where(seen["time_us"] >= latest[seen.owner] - horizon_us)


def _running_max(user: Words, value: Words) -> Words:
    """The largest value of the same user so far, its own included [N]."""
    order = np.argsort(user, kind="stable")
    levels, rank = np.unique(value[order], return_inverse=True)
    # Users ascend, so a user's first rank is above everything of the users before.
    running = np.maximum.accumulate((user[order] << 32) | rank)
    out = np.empty(len(user), np.int64)
    out[order] = levels[running & 0xFFFFFFFF]
    return out


def _repeated(user: Words, event_key: Words, seen: Rows) -> npt.NDArray[np.bool_]:
    """Units whose id is among the ids kept or came earlier in the batch [N]."""
    unit = event_key.astype(np.uint64) ^ (user.astype(np.uint64) * _MIX)
    kept = seen["event_key"].astype(np.uint64) ^ (seen.owner.astype(np.uint64) * _MIX)
    first = np.zeros(len(unit), np.bool_)
    first[np.unique(unit, return_index=True)[1]] = True
    return np.asarray(~first | np.isin(unit, kept))
