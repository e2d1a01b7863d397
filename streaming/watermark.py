"""The watermark: how far event time has come on every partition that is still moving.

It only closes impression-join windows; whether an event is late is decided per user (see `streaming.dedup`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

IDLE_S = 30.0


class Watermark:
    """The smallest of the partitions' largest event times; partitions that have been silent are left out."""

    def __init__(self, *, idle_s: float = IDLE_S, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._idle_s, self._monotonic_s = idle_s, monotonic_s
        self._partitions: dict[tuple[str, int], tuple[int, float]] = {}

    def observe(self, topic: str, partition: int, event_time_us: int) -> None:
        """A partition gave events up to this time."""
        highest, _ = self._partitions.get((topic, partition), (event_time_us, 0.0))
        self._partitions[topic, partition] = (max(highest, event_time_us), self._monotonic_s())

    def forget(self, topic: str, partition: int) -> None:
        """Another worker reads this partition now."""
        self._partitions.pop((topic, partition), None)

    def value_us(self) -> int | None:
        """Microseconds UTC; None before any event. When all are silent, the time that the furthest has reached."""
        if not self._partitions:
            return None
        now_s = self._monotonic_s()
        moving = [at for at, seen_s in self._partitions.values() if now_s - seen_s <= self._idle_s]
        return min(moving) if moving else max(at for at, _ in self._partitions.values())
