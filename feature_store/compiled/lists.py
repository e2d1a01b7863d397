"""What a user did with each item, and the newest actions.

pairs [9, R]: day, item key, first, last and last purchase in microseconds of the day (the purchase's plus one, 0 =
none), three words of two counts, sum of the logarithms of quantities bought; sorted by day. recent [4, R]: type, time,
event key, item key; sorted by these.

Shape legend: E entities, R rows, P pairs, T event types.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.compiled.how import compiled
from feature_store.narrow import Words

_NUM_TYPES = 7
_LANE = 0xFFFFFFFF


@compiled
def pair_values(pairs_at: Words, pairs: Words, out: npt.NDArray[np.float64]) -> None:
    """Numbers of distinct items touched and of distinct days with a purchase [E, 2]."""
    for e in range(len(out)):
        first, end = pairs_at[e], pairs_at[e + 1]
        items, days, last_day = 0, 0, -1
        size = 16
        while size < 2 * (end - first):
            size *= 2
        key_at = np.full(size, -1, np.int64)
        for r in range(first, end):
            at = pairs[1, r] & size - 1
            while key_at[at] not in (-1, pairs[1, r]):
                at = at + 1 & size - 1
            items += key_at[at] == -1
            key_at[at] = pairs[1, r]
            if pairs[4, r] and pairs[0, r] != last_day:
                days, last_day = days + 1, pairs[0, r]
        out[e, 0], out[e, 1] = items, days


@compiled
def grouped_pairs(
    pairs: Words, order: Words, as_of_us: int, day_us: int, count: npt.NDArray[np.int32], days: npt.NDArray[np.int32],
    quantity: npt.NDArray[np.float32], out: Words,
) -> int:  # fmt: skip
    """Rows of one user in the order of their item keys, one per item; returns how many.

    out [4, P]: item key, first, last, last purchase; count [P, 7], days [P] and quantity [2, P] are zero before.
    quantity: sum of the logarithms of quantities bought, and their mean on the last day with a purchase, in the unit of
    `pairs`. Rows whose first action is at or after as_of are left out.
    """
    k = -1
    for i in range(len(order)):
        r = order[i]
        start_us = pairs[0, r] * day_us
        first_us, last_us = start_us + pairs[2, r], start_us + pairs[3, r]
        if first_us >= as_of_us:
            continue
        bought_us = start_us + pairs[4, r] - 1 if pairs[4, r] else 0
        if k < 0 or out[0, k] != pairs[1, r]:
            k += 1
            out[0, k], out[1, k], out[2, k], out[3, k] = pairs[1, r], first_us, last_us, bought_us
        else:
            out[1, k], out[2, k] = min(out[1, k], first_us), max(out[2, k], last_us)
            out[3, k] = max(out[3, k], bought_us)
        if pairs[4, r]:
            days[k] += 1
            quantity[0, k] += pairs[8, r]
            quantity[1, k] = pairs[8, r] / max(pairs[7, r] & _LANE, 1)
        for c in range(3):
            word = pairs[5 + c, r]
            count[k, 1 + 2 * c] += word & _LANE
            count[k, 2 + 2 * c] += word >> 32
    return k + 1


@compiled
def by_time(recent: Words, as_of_us: int, kinds: npt.NDArray[np.int8], out: Words) -> int:
    """Merge the newest actions of one user, sorted by (type, time, event key), by (time, event key); returns how many.

    out [2, R]: item key, time; kinds [R]: type.
    """
    at, end = np.zeros(_NUM_TYPES, np.int64), np.zeros(_NUM_TYPES, np.int64)
    r = 0
    for t in range(_NUM_TYPES):
        at[t] = r
        while r < recent.shape[1] and recent[0, r] == t:
            r += 1
        end[t] = r
        while end[t] > at[t] and recent[1, end[t] - 1] >= as_of_us:
            end[t] -= 1
    k = 0
    while True:
        best = -1
        for t in range(_NUM_TYPES):
            if at[t] == end[t]:
                continue
            if best >= 0:
                i, j = at[t], at[best]
                if recent[1, i] > recent[1, j] or (recent[1, i] == recent[1, j] and recent[2, i] >= recent[2, j]):
                    continue
            best = t
        if best < 0:
            return k
        out[0, k], out[1, k], kinds[k] = recent[3, at[best]], recent[1, at[best]], best
        at[best] += 1
        k += 1
