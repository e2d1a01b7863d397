"""Counts by behaviour in fixed UTC time buckets, summed into windows and decayed at read.

One table, `buckets`, holds up to four kinds of buckets per entity: ten minutes, hours, days (each as far back from the
entity's newest as its longest window reaches, and one more) and hour of day (all events). A window of length w read as
of t is the sum of the whole buckets that overlap [t - w, t). Six counts of 31 bits ride in three words.

Shape legend: N events, W windows, D decays, A ages in buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from feature_store.columns import EventColumns, NewRows
from feature_store.state import Op, Table, Words
from recsys.core import EventType

SECOND_US = 1_000_000
HOUR_US = 3_600 * SECOND_US
DAY_US = 24 * HOUR_US
BEHAVIOURS = tuple(t for t in EventType if t is not EventType.NONE)
COUNT_WORDS = (("c12", Op.ADD), ("c34", Op.ADD), ("c56", Op.ADD))

KIND_SHIFT = 29
_ENTITY_SHIFT = 32
_TEN_MINUTES, _HOUR, _DAY, HOUR_OF_DAY = 1, 2, 3, 4
_AGES, WEIGHT_UNIT = 64, 1 << 24
_WIDTH_US = {_TEN_MINUTES: HOUR_US // 6, _HOUR: HOUR_US, _DAY: DAY_US}
BUCKETS = Table(
    name="buckets",
    key=("kind_index",),
    values=COUNT_WORDS,
    span=(0, 8, 26, 32, 24),
    group_shift=KIND_SHIFT,
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


def bucket_rows(code: Words, events: EventColumns, *, hour_of_day: bool) -> NewRows:
    """What N actions add to `buckets`."""
    words = counted(events.event_type)
    hour = events.time_us // HOUR_US
    index = {_TEN_MINUTES: events.time_us // _WIDTH_US[_TEN_MINUTES], _HOUR: hour, _DAY: hour // 24}
    if hour_of_day:
        index[HOUR_OF_DAY] = hour % 24
    return NewRows.concat(NewRows.of(code, (kind << KIND_SHIFT) | i, *words) for kind, i in index.items())


@dataclass(frozen=True, slots=True)
class Edges:
    """Where windows lie as of a time, in keys of `buckets`: [first, end) [W]. Decays: the number of the window whose
    buckets each weighs [D], the weight of a bucket by its age, counted from the window's last one [D, A].
    """

    first_W: Words
    end_W: Words
    window_D: Words
    weight_DA: Words


@lru_cache(maxsize=64)
def edges(as_of_us: int) -> Edges:
    """The edges as of a time. Weights are 2 ** -(age of a bucket's middle / half-life) in units of 2 ** -24: sums of
    integers do not depend on their order, nor a value on the entities that are read beside it.
    """
    # The bucket that holds as_of - 1 is the last one.
    last = {kind: -(-as_of_us // width) - 1 for kind, width in _WIDTH_US.items()}
    first_W = [(w.bucket << KIND_SHIFT) | max((as_of_us - w.length_us) // _WIDTH_US[w.bucket], 0) for w in WINDOWS]
    end_W = [(w.bucket << KIND_SHIFT) | max(last[w.bucket] + 1, 0) for w in WINDOWS]
    weight_DA = np.empty((len(DECAYS), _AGES), np.int64)
    for d, decay in enumerate(DECAYS):
        kind = WINDOWS[decay.window].bucket
        middle = (last[kind] - np.arange(_AGES)) * _WIDTH_US[kind] + _WIDTH_US[kind] // 2
        age_us = np.maximum(as_of_us - middle, 0)
        weight_DA[d] = np.rint(np.exp2(-age_us / decay.half_life_us) * WEIGHT_UNIT)
    return Edges(np.array(first_W), np.array(end_W), np.array([d.window for d in DECAYS]), weight_DA)
