"""Admission: an in-flight limit with a short, bounded queue in front of it.

Waiters are ordered by priority, then arrival. A full queue refuses the newcomer, or, where the newcomer matters more,
the last in the queue. Waiting longer than `queue_wait_ms_max` or than the deadline is a refusal too: in an open loop
a long queue only makes every answer late.

Source: Google SRE book, ch. 21 "Handling Overload" (criticality); Zhou et al., "Overload Control for Scaling WeChat
Microservices" (SoCC 2018) for shedding by priority.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from recsys.core import Deadline, Overloaded, metrics
from recsys.serving.config import AdmissionConfig


@dataclass(order=True, slots=True)
class _Waiter:
    rank: tuple[int, int]  # (-priority, arrival): smallest goes first
    turn: asyncio.Future[bool] = field(compare=False)  # True = go, False = pushed out by a more important one


class Admission:
    """Lets at most `limit` requests through at once. For one event loop."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._limit = config.in_flight_limit
        self._waiters: list[_Waiter] = []
        self._arrivals = itertools.count()
        self.in_flight = 0

    @property
    def limit(self) -> int:
        """Requests served at once."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        self._limit = value
        self._wake()

    @asynccontextmanager
    async def admitted(self, priority: int, deadline: Deadline) -> AsyncIterator[None]:
        """Hold one of `limit` places for the body.

        Raises: Overloaded when there is no place in time; DeadlineExceeded when the deadline passed while waiting.
        """
        if self.in_flight < self._limit and not self._waiters:
            self.in_flight += 1
        else:
            await self._wait(priority, deadline)
        metrics.IN_FLIGHT.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self._wake()
            metrics.IN_FLIGHT.set(self.in_flight)

    async def _wait(self, priority: int, deadline: Deadline) -> None:
        waiter = _Waiter((-priority, next(self._arrivals)), asyncio.get_running_loop().create_future())
        bisect.insort(self._waiters, waiter)
        if len(self._waiters) > self._config.queue_items_max:
            last = self._waiters.pop()
            last.turn.set_result(False)
        remaining_s, wait_s_max = deadline.timeout_s(), self._config.queue_wait_ms_max / 1e3
        try:
            await asyncio.wait(
                {waiter.turn}, timeout=wait_s_max if remaining_s is None else min(remaining_s, wait_s_max)
            )
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        if not waiter.turn.done():
            self._leave(waiter)
            deadline.require("Recommend, waiting for admission")
            raise self._refusal("queue_wait", f"a wait of more than {self._config.queue_wait_ms_max:g} ms")
        if not waiter.turn.result():
            raise self._refusal("queue_full", f"{self._limit} in flight and {self._config.queue_items_max} waiting")
        if deadline.expired:
            self.in_flight -= 1
            self._wake()
            metrics.SHED.labels("expired").inc()
            deadline.require("Recommend, waiting for admission")

    def _leave(self, waiter: _Waiter) -> None:
        """Give back whatever a waiter that stops waiting holds: its queue entry, or the place it was just given."""
        if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.result():
            self.in_flight -= 1
            self._wake()
        elif waiter in self._waiters:
            self._waiters.remove(waiter)

    def _wake(self) -> None:
        while self._waiters and self.in_flight < self._limit:
            self.in_flight += 1
            self._waiters.pop(0).turn.set_result(True)

    def _refusal(self, reason: str, came: str) -> Overloaded:
        metrics.SHED.labels(reason).inc()
        return Overloaded(
            "Recommend",
            came=came,
            expected="a place within the limits of [serving.admission]",
            fix="Do not retry: show what the page has. Operators: add gateways, or activate a peak plan.",
        )
