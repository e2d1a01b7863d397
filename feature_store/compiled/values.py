"""Scalar features of users and items from their rows.

life [8, R]: event type, count, first and last time, priced, sum of prices, of their logarithms, of those of quantities.
buckets [4, R]: key and three words of two counts.

Shape legend: E entities, R rows, W windows, D decays, A ages, B behaviours (EventType 1 to 6), F features; columns
[C, R] are C-contiguous int64, offsets [E + 1] as in `state.Rows`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.compiled.how import compiled
from feature_store.narrow import Words

Floats = npt.NDArray[np.float64]

_NEVER_US = np.iinfo(np.int64).max
_IMPRESSION, _VIEW, _CART, _PURCHASE = 1, 2, 4, 5
_NUM_TYPES, _NUM_BEHAVIOURS = 7, 6
_LANE = 0xFFFFFFFF
_NUM_LIFE = 7


@compiled
def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else np.nan


@compiled
def _days(as_of_us: int, time_us: int, day_us: int) -> float:
    return (as_of_us - time_us) / day_us if as_of_us > time_us else 0.0


@compiled
def _life_of(life: Words, first: int, end: int, life_BC: Words) -> None:
    """Fill the row of each event type [7, 7]; without one the first time is never, the last -1, all else 0."""
    for t in range(_NUM_TYPES):
        life_BC[t, 0] = life_BC[t, 3] = life_BC[t, 4] = life_BC[t, 5] = life_BC[t, 6] = 0
        life_BC[t, 1], life_BC[t, 2] = _NEVER_US, -1
    for r in range(first, end):
        if life[0, r] < _NUM_TYPES:  # as it always is, but nothing else would notice a broken blob
            for c in range(_NUM_LIFE):
                life_BC[life[0, r], c] = life[c + 1, r]


@compiled
def _quantity_level(life_BC: Words, log_quantity_unit: int, log_2: float) -> float:
    """Mean natural logarithm of the quantities of purchases; NaN without any."""
    return _ratio(life_BC[_PURCHASE, 6], life_BC[_PURCHASE, 0]) / log_quantity_unit * log_2


@compiled
def _windows_of(
    buckets: Words, start: int, end: int, first_W: Words, end_W: Words, row_W2: Words, count_WB: Words
) -> None:
    """Rows [W, 2] of buckets with a key in [first, end) of a window, and their counts [W, B]."""
    low = start
    for w in range(len(first_W)):
        if w and first_W[w] < first_W[w - 1]:
            low = start
        while low < end and buckets[0, low] < first_W[w]:
            low += 1
        high = low
        while high < end and buckets[0, high] < end_W[w]:
            high += 1
        row_W2[w, 0], row_W2[w, 1] = low, high
        for i in range(3):
            packed = 0  # two counts at once: neither gets to 31 bits
            for r in range(low, high):
                packed += buckets[i + 1, r]
            count_WB[w, 2 * i], count_WB[w, 2 * i + 1] = packed & _LANE, packed >> 32


@compiled
def item_values(
    life_at: Words, life: Words, bucket_at: Words, buckets: Words, latest_at: Words, latest: Words, as_of_us: int,
    first_W: Words, end_W: Words, window_D: Words, weight_DA: Words, weight_unit: int, day_us: int,
    log_quantity_unit: int, log_2: float, out: Floats,
) -> None:  # fmt: skip
    """Scalar features [E, F] of items in the order of `views.item`.

    latest [4, R]: field (price, first price, stock, listed, seen price), time, event key, value. weight_DA: of a bucket
    by its age in buckets, counted from the last bucket of its decay's window.
    """
    count_WB, life_BC = np.empty((len(first_W), _NUM_BEHAVIOURS), np.int64), np.empty((_NUM_TYPES, _NUM_LIFE), np.int64)
    row_W2 = np.empty((len(first_W), 2), np.int64)
    decayed_DB, field = np.empty((len(window_D), 3), np.int64), np.empty(5, np.float64)
    for e in range(len(out)):
        _windows_of(buckets, bucket_at[e], bucket_at[e + 1], first_W, end_W, row_W2, count_WB)
        _life_of(life, life_at[e], life_at[e + 1], life_BC)
        decayed_DB[:] = 0
        for d in range(len(window_D)):
            w = window_D[d]
            for r in range(row_W2[w, 0], row_W2[w, 1]):
                weight = weight_DA[d, min(end_W[w] - 1 - buckets[0, r], weight_DA.shape[1] - 1)]
                decayed_DB[d, 0] += (buckets[1, r] >> 32) * weight  # view
                decayed_DB[d, 1] += (buckets[2, r] >> 32) * weight  # cart
                decayed_DB[d, 2] += (buckets[3, r] & _LANE) * weight  # purchase
        field[:] = np.nan
        for r in range(latest_at[e], latest_at[e + 1]):
            if latest[0, r] < len(field):
                field[latest[0, r]] = latest[3, r]
        f = 0
        for w in range(len(first_W)):
            for b in range(_NUM_BEHAVIOURS):
                out[e, f] = count_WB[w, b]
                f += 1
        for b in range(_NUM_BEHAVIOURS):
            out[e, f] = life_BC[b + 1, 0]
            f += 1
        for d in range(len(window_D)):
            for b in range(3):
                out[e, f] = decayed_DB[d, b] / weight_unit
                f += 1
        for t in (_VIEW, _CART, _PURCHASE):
            out[e, f] = _days(as_of_us, life_BC[t, 2], day_us) if life_BC[t, 2] >= 0 else np.nan
            f += 1
        priced = price_sum = 0
        first_us = _NEVER_US
        for t in range(_NUM_TYPES):
            first_us = min(first_us, life_BC[t, 1])
            priced, price_sum = priced + life_BC[t, 3], price_sum + life_BC[t, 4]
        price, usual = field[4] if np.isnan(field[0]) else field[0], _ratio(price_sum, priced)
        month = count_WB[-1]
        out[e, f] = _ratio(month[_VIEW - 1], month[_IMPRESSION - 1])
        out[e, f + 1] = _ratio(month[_PURCHASE - 1], month[_VIEW - 1])
        out[e, f + 2], out[e, f + 3] = price, usual
        out[e, f + 4], out[e, f + 5] = 1.0 - _ratio(price, field[1]), 1.0 - _ratio(price, usual)
        out[e, f + 6], out[e, f + 7] = field[2], field[3]
        out[e, f + 8] = _days(as_of_us, first_us, day_us)
        out[e, f + 9] = _quantity_level(life_BC, log_quantity_unit, log_2)


@compiled
def _shares(affinity: Words, first: int, end: int, kind: int, out: Floats) -> None:
    """Number of distinct keys of a kind and share of the most frequent one, in out [2]; NaN without any.

    affinity [5, R]: 2 * month + kind, key, three words of two counts; impressions do not count.
    """
    out[:] = np.nan
    size = 16
    while size < 2 * (end - first):
        size *= 2
    key_at, count_at = np.full(size, -1, np.int64), np.zeros(size, np.int64)
    distinct = most = total = 0
    for r in range(first, end):
        if affinity[0, r] & 1 != kind:
            continue
        at = affinity[1, r] & size - 1
        while key_at[at] not in (-1, affinity[1, r]):
            at = at + 1 & size - 1
        distinct += key_at[at] == -1
        key_at[at] = affinity[1, r]
        acted = affinity[2, r] >> 32
        for c in (3, 4):
            acted += (affinity[c, r] & _LANE) + (affinity[c, r] >> 32)
        count_at[at] += acted
        total += acted
        most = max(most, count_at[at])
    if distinct:
        out[0], out[1] = distinct, most / total


@compiled
def user_values(
    life_at: Words, life: Words, bucket_at: Words, buckets: Words, affinity_at: Words, affinity: Words, as_of_us: int,
    first_W: Words, end_W: Words, hour_kind: int, kind_shift: int, hour_us: int, day_us: int, log_price_unit: int,
    log_quantity_unit: int, log_2: float, out: Floats,
) -> None:  # fmt: skip
    """Scalar features [E, F] of users in the order of `views.user`. hour_kind: kind of the buckets by hour of day."""
    count_WB, life_BC = np.empty((len(first_W), _NUM_BEHAVIOURS), np.int64), np.empty((_NUM_TYPES, _NUM_LIFE), np.int64)
    row_W2 = np.empty((len(first_W), 2), np.int64)
    now = as_of_us // hour_us
    for e in range(len(out)):
        _windows_of(buckets, bucket_at[e], bucket_at[e + 1], first_W, end_W, row_W2, count_WB)
        _life_of(life, life_at[e], life_at[e + 1], life_BC)
        near = around_the_clock = 0
        for r in range(bucket_at[e], bucket_at[e + 1]):
            if buckets[0, r] >> kind_shift == hour_kind:
                acted = buckets[1, r] >> 32
                for c in (2, 3):
                    acted += (buckets[c, r] & _LANE) + (buckets[c, r] >> 32)
                around_the_clock += acted
                hour = buckets[0, r] & (1 << kind_shift) - 1
                if (hour - now + 1) % 24 < 3:
                    near += acted
        f = 0
        for w in range(len(first_W)):
            for b in range(_NUM_BEHAVIOURS):
                out[e, f] = count_WB[w, b]
                f += 1
        for b in range(_NUM_BEHAVIOURS):
            out[e, f] = life_BC[b + 1, 0]
            f += 1
        newest = np.nan
        for t in range(2, _NUM_TYPES):
            out[e, f] = _days(as_of_us, life_BC[t, 2], day_us) if life_BC[t, 2] >= 0 else np.nan
            newest = out[e, f] if np.isnan(newest) or out[e, f] < newest else newest
            f += 1
        priced = log_sum = 0
        first_us = _NEVER_US
        for t in range(_NUM_TYPES):
            first_us = min(first_us, life_BC[t, 1]) if t else first_us
            priced, log_sum = priced + life_BC[t, 3], log_sum + life_BC[t, 5]
        out[e, f] = newest
        out[e, f + 1] = _days(as_of_us, first_us, day_us)
        out[e, f + 2] = _ratio(log_sum, priced) / log_price_unit * log_2
        out[e, f + 3] = _ratio(life_BC[_PURCHASE, 4], life_BC[_PURCHASE, 3])
        out[e, f + 4] = _ratio(near, around_the_clock)
        for kind in range(2):
            _shares(affinity, affinity_at[e], affinity_at[e + 1], kind, out[e, f + 5 + 2 * kind : f + 7 + 2 * kind])
        out[e, f + 9] = _quantity_level(life_BC, log_quantity_unit, log_2)
