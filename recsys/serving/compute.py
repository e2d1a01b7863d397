"""Where a worker computes: one thread, a bounded number of calls waiting for it, expired ones dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from recsys.core import Deadline, Overloaded

T = TypeVar("T")


class ComputeThread:
    """Runs plain functions off the event loop, one at a time, in order of arrival."""

    def __init__(self, queue_items_max: int, start: Callable[[], None] | None = None) -> None:
        """start: called once, on the thread, before its first work."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute", initializer=start)
        self._queue_items_max = queue_items_max
        self._waiting = 0

    async def run(self, what: str, work: Callable[[], T], deadline: Deadline) -> T:
        """The result of `work`.

        Raises: Overloaded when too many calls wait; DeadlineExceeded when the time was over at its turn.
        """
        if self._waiting >= self._queue_items_max:
            raise Overloaded(
                what,
                came=f"{self._waiting} calls waiting",
                expected=f"at most {self._queue_items_max}",
                fix="Do not retry; add workers.",
            )

        def in_time() -> T:
            deadline.require(what)
            return work()

        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, in_time)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Wait for the call being computed."""
        self._executor.shutdown(wait=True)
