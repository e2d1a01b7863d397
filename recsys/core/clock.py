"""Clocks are injected. `wall` is the machine's, `data` is the largest event time the store has seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from recsys.core import metrics
from recsys.core.errors import Unavailable


class Clock(Protocol):
    """Gives "now" for feature reads and event times."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        ...


class WallClock:
    """The machine's clock, never running backwards within one process.

    A step back (NTP, a suspended VM) would make features read in the past and event times regress, so the largest
    value given so far is held until real time has caught up.
    """

    def __init__(self, source_ns: Callable[[], int] = time.time_ns) -> None:
        self._source_ns = source_ns
        self._last_us = 0

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC, monotone."""
        self._last_us = max(self._last_us, self._source_ns() // 1000)
        return self._last_us


class DataClock:
    """Time as the data knows it: the store's largest event time, plus one microsecond so that it is visible.

    For demos, replays and historical imports (`clock = "data"`). It stands still while the store is away.
    """

    def __init__(self, max_event_time_us: Callable[[], int]) -> None:
        self._max_event_time_us = max_event_time_us
        self._last_us = 0

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC, monotone. Raises: Unavailable when the store has never answered."""
        try:
            self._last_us = max(self._last_us, self._max_event_time_us() + 1)
        except Unavailable:
            if not self._last_us:
                raise
            metrics.FALLBACKS.labels("clock", "unavailable").inc()
        return self._last_us


class ManualClock:
    """A clock that stands still until told, for offline callers and tests."""

    def __init__(self, at_us: int) -> None:
        self.at_us = at_us

    def now_us(self) -> int:
        """The time it was set to, microseconds UTC."""
        return self.at_us
