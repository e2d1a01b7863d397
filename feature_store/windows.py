"""Counts by behaviour in fixed UTC time buckets, summed into windows and decayed at read.

One table, `buckets`, holds four kinds of buckets per entity: ten minutes, hours, days (each with as many of the
newest as its longest window needs) and hour of day (all events). A window of length w read as of t is the sum of
the whole buckets that overlap [t - w, t). Six counts of 31 bits ride in three words.

Shape legend: N events, E entities, R rows, B behaviours (EventType 1 to 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.state import Op, Rows, Table, Words, spread
from recsys.core import EventType

SECOND_US = 1_000_000
HOUR_US = 3_600 * SECOND_US
DAY_US = 24 * HOUR_US
BEHAVIOURS = tuple(t for t in EventType if t is not EventType.NONE)
COUNT_WORDS = (("c12", Op.ADD), ("c34", Op.ADD), ("c56", Op.ADD))

_KIND_SHIFT = 40
_TEN_MINUTES, _HOUR, _DAY, _HOUR_OF_DAY = 1, 2, 3, 4
_WIDTH_US = {_TEN_MINUTES: HOUR_US // 6, _HOUR: HOUR_US, _DAY: DAY_US}
BUCKETS = Table(
    name="buckets",
    key=("kind_index",),
    values=COUNT_WORDS,
    keep=(0, 8, 26, 32, 24),
    group_shift=_KIND_SHIFT,
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
    """A declared decayed count: its name, the kind of bucket it sums, its half-life."""

    name: str
    bucket: int
    half_life_us: int


DECAYS = (Decay("6h", _HOUR, 6 * HOUR_US), Decay("7d", _DAY, 7 * DAY_US))


def counted(event_type: Words) -> tuple[Words, Words, Words]:
    """The three count words [N] of one event each."""
    lane = np.left_shift(1, 32 * ((event_type - 1) & 1))
    word = (event_type - 1) >> 1
    return np.where(word == 0, lane, 0), np.where(word == 1, lane, 0), np.where(word == 2, lane, 0)


def counts(rows: Rows) -> npt.NDArray[np.int32]:
    """Counts by behaviour [R, 6] of the last three words of each row."""
    lanes: npt.NDArray[np.int32] = np.ascontiguousarray(rows.words[:, -3:]).view(np.int32)
    return lanes


def bucket_rows(code: Words, events: EventColumns) -> NewRows:
    """What N actions add to `buckets`."""
    words = counted(events.event_type)
    parts = [
        NewRows.of(code, (kind << _KIND_SHIFT) | (events.time_us // width), *words) for kind, width in _WIDTH_US.items()
    ]
    hour = events.time_us // HOUR_US % 24
    return NewRows.concat([*parts, NewRows.of(code, (_HOUR_OF_DAY << _KIND_SHIFT) | hour, *words)])


def ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Part / whole, NaN where whole is 0 or unknown."""
    out = np.full(part.shape, np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out


class BucketReader:
    """Window sums of E entities as of a time, from running totals: two look-ups per entity and window."""

    def __init__(self, rows: Rows, as_of_us: int) -> None:
        self._as_of_us = as_of_us
        self._num_entities = len(rows.offsets) - 1
        self._key = rows["kind_index"]
        self._order = (rows.owner << 44) | self._key
        self._rows = rows
        # Of the packed words: a difference of two totals is exact whatever wraps around in between.
        self._total = np.zeros((len(COUNT_WORDS), len(self._key) + 1), np.int64)
        np.cumsum(np.ascontiguousarray(rows.words[:, -len(COUNT_WORDS) :].T), axis=1, out=self._total[:, 1:])

    def window(self, window: Window) -> npt.NDArray[np.float64]:
        """Counts [E, B] in a window."""
        first = (self._as_of_us - window.length_us) // _WIDTH_US[window.bucket]
        return self._sums(*self._span(window.bucket, first))

    def decayed(self, decay: Decay, behaviours: tuple[EventType, ...]) -> npt.NDArray[np.float64]:
        """Counts [E, len(behaviours)], each bucket weighted by 2 ** -(age of its middle / half-life)."""
        width = _WIDTH_US[decay.bucket]
        low, high = self._span(decay.bucket, 0)
        at = spread(low, high - low)
        middle = (self._key[at] & ((1 << _KIND_SHIFT) - 1)) * width + width // 2
        weight = np.exp2(-np.maximum(self._as_of_us - middle, 0) / decay.half_life_us)
        lanes = np.ascontiguousarray(self._rows.words[at, -len(COUNT_WORDS) :]).view(np.int32)
        weighted = lanes[:, [b - 1 for b in behaviours]] * weight[:, None]
        # Not from running totals: a value must not depend, to the last bit, on the entities read beside it.
        sums, some = np.zeros((self._num_entities, len(behaviours))), high > low
        if some.any():
            starts = np.cumsum(high - low) - (high - low)
            sums[some] = np.add.reduceat(weighted, starts[some], axis=0)
        return sums

    def hour_of_day(self) -> npt.NDArray[np.float64]:
        """Share [E] of all actions (impressions left out) within an hour of the time of day; NaN without any."""
        everything = self._sums(*self._span(_HOUR_OF_DAY, 0))[:, 1:].sum(axis=1)
        near = np.zeros(self._num_entities)
        now = self._as_of_us // HOUR_US
        entity = np.arange(self._num_entities) << 44
        for hour in ((now - 1) % 24, now % 24, (now + 1) % 24):
            key = entity | (_HOUR_OF_DAY << _KIND_SHIFT) | hour
            first, last = np.searchsorted(self._order, key), np.searchsorted(self._order, key, side="right")
            near += self._sums(first, last)[:, 1:].sum(axis=1)
        return ratio(near, everything)

    def _sums(self, low: Words, high: Words) -> npt.NDArray[np.float64]:
        """Counts [E, B] of rows low to high of each entity."""
        packed = np.ascontiguousarray((self._total[:, high] - self._total[:, low]).T)
        return packed.view(np.int32).astype(np.float64)

    def _span(self, kind: int, first_index: int) -> tuple[Words, Words]:
        """First row and end row [E] of the buckets of a kind from an index on, none that starts at or after as_of."""
        entity = np.arange(self._num_entities) << 44
        end_index = (
            (1 << _KIND_SHIFT) - 1 if kind == _HOUR_OF_DAY else -(-self._as_of_us // _WIDTH_US[kind])
        )  # the bucket that holds as_of - 1 is the last one
        low = np.searchsorted(self._order, entity | (kind << _KIND_SHIFT) | max(first_index, 0))
        high = np.searchsorted(self._order, entity | (kind << _KIND_SHIFT) | max(end_index, 0))
        return low, np.maximum(low, high)
