"""Counts by behaviour in fixed UTC time buckets, summed into windows and decayed at read.

One table, `buckets`, holds up to four kinds of buckets per entity: ten minutes, hours, days (each as far back from the
entity's newest as its longest window reaches, and one more) and hour of day (all events). A window of length w read as
of t is the sum of the whole buckets that overlap [t - w, t). Six counts of 31 bits ride in three words.

Shape legend: N events, E entities, R rows, B behaviours (EventType 1 to 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.state import Op, Rows, Table, Words
from recsys.core import EventType

SECOND_US = 1_000_000
HOUR_US = 3_600 * SECOND_US
DAY_US = 24 * HOUR_US
BEHAVIOURS = tuple(t for t in EventType if t is not EventType.NONE)
COUNT_WORDS = (("c12", Op.ADD), ("c34", Op.ADD), ("c56", Op.ADD))

_KIND_SHIFT = 29
_ENTITY_SHIFT = 32
_TEN_MINUTES, _HOUR, _DAY, _HOUR_OF_DAY = 1, 2, 3, 4
_AGES, _WEIGHT_UNIT = 64, 1 << 24
_WIDTH_US = {_TEN_MINUTES: HOUR_US // 6, _HOUR: HOUR_US, _DAY: DAY_US}
BUCKETS = Table(
    name="buckets",
    key=("kind_index",),
    values=COUNT_WORDS,
    span=(0, 8, 26, 32, 24),
    group_shift=_KIND_SHIFT,
    codes=("u4", "2u2", "2u2", "2u2"),
)


@dataclass(frozen=True, slots=True)
class Window:
    """A declared window: its name, the kind of bucket it sums, its length."""

    name: str
    bucket: int
    length_us: int


WINDOWS = (
    Window("1h", _TEN_MINUTES, HOUR_US),
    Window("1d", _HOUR, DAY_US),
    Window("7d", _DAY, 7 * DAY_US),
    Window("30d", _DAY, 30 * DAY_US),
)


@dataclass(frozen=True, slots=True)
class Decay:
    """A declared decayed count: its name, which window (a place in WINDOWS) it weighs, its half-life."""

    name: str
    window: int
    half_life_us: int


DECAYS = (Decay("6h", 1, 6 * HOUR_US), Decay("7d", 3, 7 * DAY_US))


def counted(event_type: Words) -> tuple[Words, Words, Words]:
    """The three count words [N] of one event each."""
    lane = np.left_shift(1, 32 * ((event_type - 1) & 1))
    word = (event_type - 1) >> 1
    return np.where(word == 0, lane, 0), np.where(word == 1, lane, 0), np.where(word == 2, lane, 0)


def counts(rows: Rows) -> npt.NDArray[np.int32]:
    """Counts by behaviour [R, 6] of the last three words of each row."""
    lanes: npt.NDArray[np.int32] = np.ascontiguousarray(rows.words[:, -3:]).view(np.int32)
    return lanes


def bucket_rows(code: Words, events: EventColumns, *, hour_of_day: bool) -> NewRows:
    """What N actions add to `buckets`."""
    words = counted(events.event_type)
    hour = events.time_us // HOUR_US
    index = {_TEN_MINUTES: events.time_us // _WIDTH_US[_TEN_MINUTES], _HOUR: hour, _DAY: hour // 24}
    if hour_of_day:
        index[_HOUR_OF_DAY] = hour % 24
    return NewRows.concat(NewRows.of(code, (kind << _KIND_SHIFT) | i, *words) for kind, i in index.items())


def ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Part / whole, NaN where whole is 0 or unknown."""
    out = np.full(part.shape, np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out


class BucketReader:
    """Window sums of E entities as of a time, from running totals: two look-ups per entity and window.

    Everything is summed as integers, decayed counts too, so a value does not depend, to the last bit, on the entities
    that are read beside it.
    """

    def __init__(self, rows: Rows, as_of_us: int) -> None:
        self._as_of_us, self._rows, self._num_entities = as_of_us, rows, len(rows.offsets) - 1
        self._packed = rows.words.T[-len(COUNT_WORDS) :]
        # The bucket that holds as_of - 1 is the last one.
        self._end = {kind: -(-as_of_us // width) for kind, width in _WIDTH_US.items()}
        first = [(w.bucket << _KIND_SHIFT) | max((as_of_us - w.length_us) // _WIDTH_US[w.bucket], 0) for w in WINDOWS]
        end = [(w.bucket << _KIND_SHIFT) | max(self._end[w.bucket], 0) for w in WINDOWS]
        edges = sorted({*first, *end})
        wanted = (np.arange(self._num_entities) << _ENTITY_SHIFT)[:, None] + np.array(edges)
        at = np.searchsorted((rows.owner << _ENTITY_SHIFT) | rows.words[:, 0], wanted)
        # First row and end row [E, windows]; none for a time before everything.
        self._low = at[:, [edges.index(f) for f in first]]
        self._high = np.maximum(self._low, at[:, [edges.index(e) for e in end]])

    def windows(self) -> npt.NDArray[np.float64]:
        """Counts [E, len(WINDOWS) * B], window by window."""
        # Of the packed words: a difference of two totals is exact whatever wraps around in between.
        total = _running(self._packed)
        packed = np.moveaxis(total[:, self._high] - total[:, self._low], 0, 2)
        lanes: npt.NDArray[np.int32] = np.ascontiguousarray(packed).view(np.int32)
        return lanes.reshape(self._num_entities, len(WINDOWS) * len(BEHAVIOURS)).astype(np.float64)

    def decayed(self, behaviours: Sequence[EventType]) -> npt.NDArray[np.float64]:
        """Counts [E, len(DECAYS) * len(behaviours)]: of a decay's window, each bucket weighted by
        2 ** -(age of its middle / half-life), to 2 ** -24.
        """
        weight_KA = np.zeros((max(_WIDTH_US) + 2, _AGES), np.int64)  # by kind of bucket and age in buckets
        for decay in DECAYS:
            kind = WINDOWS[decay.window].bucket
            middle = (self._end[kind] - 1 - np.arange(_AGES)) * _WIDTH_US[kind] + _WIDTH_US[kind] // 2
            age_us = np.maximum(self._as_of_us - middle, 0)
            weight_KA[kind] = np.rint(np.exp2(-age_us / decay.half_life_us) * _WEIGHT_UNIT)
        last = np.array([(k << _KIND_SHIFT) + self._end.get(k, 0) - 1 for k in range(len(weight_KA))])
        of_row = self._rows.words[:, 0] >> _KIND_SHIFT
        age = np.minimum((last.take(of_row) - self._rows.words[:, 0]).view(np.uint64), _AGES - 1).view(np.int64)
        weight = weight_KA.ravel().take(of_row * _AGES + age)
        lanes = [self._packed[(b - 1) >> 1] >> 32 * ((b - 1) & 1) & 0xFFFFFFFF for b in behaviours]
        total = _running(np.stack(lanes) * weight)
        chosen = [d.window for d in DECAYS]
        sums = np.moveaxis(total[:, self._high[:, chosen]] - total[:, self._low[:, chosen]], 0, 2)
        return sums.reshape(self._num_entities, len(DECAYS) * len(behaviours)) / _WEIGHT_UNIT

    def hour_of_day(self) -> npt.NDArray[np.float64]:
        """Share [E] of all actions (impressions left out) within an hour of the time of day; NaN without any."""
        key = self._rows.words[:, 0]
        at = np.flatnonzero(key >> _KIND_SHIFT == _HOUR_OF_DAY)
        owner, hour = self._rows.owner[at], key[at] & ((1 << _KIND_SHIFT) - 1)
        acted = np.ascontiguousarray(self._packed[:, at].T).view(np.int32)[:, 1:].sum(axis=1)
        now = self._as_of_us // HOUR_US
        near = (hour - now + 1) % 24 < 3
        everything = np.bincount(owner, weights=acted, minlength=self._num_entities)
        return ratio(np.bincount(owner[near], weights=acted[near], minlength=self._num_entities), everything)


def _running(rows: Words) -> Words:
    """Totals [C, R + 1] of all rows [C, R] before each."""
    total = np.zeros((len(rows), rows.shape[1] + 1), np.int64)
    np.cumsum(rows, axis=1, out=total[:, 1:])
    return total
