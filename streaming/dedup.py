"""Each event once: which events of a batch are new, which are repeats, which come too late to be told apart.

Per user the store keeps the ids of events no older than the horizon behind the user's latest event, at most SEEN_MAX.
Id present: duplicate. Older than the horizon, or than the oldest id of a full list: late, because a repeat could no
longer be recognised. All others are applied, in whatever order they come.

Shape legend: N units (events, or slates), E users, R ids kept.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from feature_store.columns import NewRows
from feature_store.commit import SEEN_MAX
from feature_store.fold import merge
from feature_store.state import Rows, Words
from feature_store.update import kept_ids

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

    The horizon moves with each user's latest event so far, and so does the oldest id of a full list: the outcome does
    not depend on how records are batched.
    """
    outcome = np.zeros(len(user), np.int8)
    if not len(user):
        return outcome, seen
    stored = np.full(len(seen.offsets) - 1, -1, np.int64)
    some = seen.counts > 0
    stored[some] = seen["time_us"][seen.offsets[1:][some] - 1]
    late = time_us < _running_max(user, np.maximum(time_us, stored[user])) - horizon_us
    outcome[_repeated(user, event_key, seen)] = Outcome.DUPLICATE
    outcome[late] = Outcome.LATE  # also what is still kept: by the rules it was dropped before this unit came
    crowded = seen.counts + np.bincount(user, minlength=len(stored)) > SEEN_MAX
    new = (outcome == Outcome.APPLIED) & ~crowded[user]
    rows = [NewRows.of(user[new], time_us[new], event_key[new])]
    for one in np.flatnonzero(crowded).tolist():  # rare: nobody shops a thousand times a day, but robots do
        at = np.flatnonzero(user == one)
        kept = seen.words[seen.offsets[one] : seen.offsets[one + 1]].tolist()
        outcome[at] = _one_by_one(time_us[at].tolist(), event_key[at].tolist(), kept, horizon_us)
        rows.append(NewRows(np.full(len(kept), one), np.array(kept, np.int64)))
    if crowded.any():
        seen = seen.where(~crowded[seen.owner])
    seen = merge(seen, NewRows.concat(rows))
    return outcome, kept_ids(seen, horizon_us)


def _one_by_one(time_us: list[int], event_key: list[int], kept: list[list[int]], horizon_us: int) -> list[Outcome]:
    """Outcomes of one user's units whose list may get full; `kept`, [time, key] ascending, is changed in place."""
    ids, outcomes = {key for _, key in kept}, []
    for at, key in zip(time_us, event_key, strict=True):
        latest = max(at, kept[-1][0]) if kept else at
        gone = bisect_left(kept, [latest - horizon_us])
        ids.difference_update(key for _, key in kept[:gone])
        del kept[:gone]
        if at < latest - horizon_us or (len(kept) == SEEN_MAX and [at, key] < kept[0]):
            outcomes.append(Outcome.LATE)
        elif key in ids:
            outcomes.append(Outcome.DUPLICATE)
        else:
            outcomes.append(Outcome.APPLIED)
            insort(kept, [at, key])
            ids.add(key)
            if len(kept) > SEEN_MAX:
                ids.discard(kept.pop(0)[1])
    return outcomes


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
