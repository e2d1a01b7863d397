"""Micro-batching on the event loop: earliest deadline first, bounded in tokens and in queue.

There is no timer. While one batch computes in the engine's thread, requests gather; the next batch is the most urgent
of them. An idle engine starts at once.

Earliest deadline first alone collapses under overload: every request is taken up when its time is nearly over, its
deadline affords next to nothing, and nobody shares its batch. So where not all that wait can be in time, as many of the
most urgent are given up, at once, as make the next batch the largest (Moore's rule for jobs of about one length,
Management Science 15, 1968, applied to batches). Where all can be in time nobody is given up.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from recsys.core import metrics
from recsys.core.deadline import Deadline
from recsys.core.errors import DeadlineExceeded, Double11Error, Internal, Overloaded

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(order=True, slots=True)
class _Waiting(Generic[Q, R]):
    at_s: float
    sequence: int
    request: Q = field(compare=False)
    tokens: int = field(compare=False)
    deadline: Deadline = field(compare=False)
    entered_s: float = field(compare=False)
    answer: asyncio.Future[R] = field(compare=False)


class Batcher(Generic[Q, R]):
    """Collects requests and hands them to `run` in batches, on `executor`, one batch at a time."""

    def __init__(
        self,
        run: Callable[[Sequence[Q], Sequence[float], int], Sequence[R | Double11Error]],
        affordable_tokens: Callable[[float], int],
        executor: Executor,
        *,
        batch_tokens_max: int,
        queue_requests_max: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """run(requests, queue_ms of each, tokens allowed) answers each request or gives its error.

        affordable_tokens(remaining_ms): tokens that can be computed in that time: what a batch may have of them, up to
        batch_tokens_max.
        """
        self._run, self._affordable_tokens, self._executor = run, affordable_tokens, executor
        self._batch_tokens_max, self._queue_requests_max, self._clock_s = batch_tokens_max, queue_requests_max, clock_s
        self._heap: list[_Waiting[Q, R]] = []
        self._sequence = itertools.count()
        self._drainer: asyncio.Task[None] | None = None

    async def submit(self, request: Q, tokens: int, deadline: Deadline) -> R:
        """The answer to one request.

        Raises: Overloaded when the queue is full, or when it is given up for others; DeadlineExceeded when the time is
        over before its batch starts; whatever error `run` gave for it.
        """
        deadline.require("rerank")
        if len(self._heap) >= self._queue_requests_max:  # of which some callers may have gone
            self._heap = [entry for entry in self._heap if not entry.answer.done()]
            heapq.heapify(self._heap)
        if len(self._heap) >= self._queue_requests_max:
            metrics.RERANK_REFUSED.labels("queue-full").inc()
            raise Overloaded(
                "rerank queue",
                came=f"{len(self._heap)} requests waiting",
                expected=f"fewer than {self._queue_requests_max}",
                fix="Take the ranker's order now; add rerank workers if this lasts.",
            )
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        entry = _Waiting(deadline.at_s, next(self._sequence), request, tokens, deadline, self._clock_s(), answer)
        heapq.heappush(self._heap, entry)
        if self._drainer is None or self._drainer.done():
            self._drainer = asyncio.create_task(self._drain())
        try:
            return await asyncio.wait_for(answer, deadline.timeout_s())
        except TimeoutError:
            raise _too_late() from None

    async def _drain(self) -> None:
        await asyncio.sleep(0)  # requests of the same turn of the loop share the first batch
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            entries, tokens = batch
            now_s = self._clock_s()
            queue_ms = [(now_s - e.entered_s) * 1e3 for e in entries]
            computing = loop.run_in_executor(self._executor, self._run, [e.request for e in entries], queue_ms, tokens)
            await asyncio.wait([computing])
            if (error := computing.exception()) is not None:  # nobody may wait forever for a batch that failed
                broken = Internal("rerank batch", came=repr(error), expected="scores", fix="Report it with the log.")
                answers: Sequence[R | Double11Error] = [broken] * len(entries)
            else:
                answers = computing.result()
            for entry, answer in zip(entries, answers, strict=True):
                if entry.answer.done():  # the caller has gone
                    continue
                if isinstance(answer, Double11Error):
                    entry.answer.set_exception(answer)
                else:
                    entry.answer.set_result(answer)

    def _next_batch(self) -> tuple[list[_Waiting[Q, R]], int] | None:
        """The most urgent request, and those after it that fit the tokens its deadline affords."""
        waiting = self._in_time()
        if not waiting:
            return None
        allowed_N = [self._affordable_tokens(entry.deadline.remaining_ms()) for entry in waiting]
        cost_N = list(itertools.accumulate(entry.tokens for entry in waiting))
        first = 0
        if any(cost > allowed for cost, allowed in zip(cost_N, allowed_N, strict=True)):
            sizes = [self._fitting(cost_N, i, allowed_N[i]) for i in range(len(waiting))]
            first = sizes.index(max(sizes))
        for entry in waiting[:first]:
            metrics.RERANK_REFUSED.labels("given-up").inc()
            entry.answer.set_exception(_given_up(len(waiting)))
        size = max(1, self._fitting(cost_N, first, allowed_N[first]))
        self._heap = waiting[first + size :]  # sorted, and so a heap
        return waiting[first : first + size], min(allowed_N[first], self._batch_tokens_max)

    def _in_time(self) -> list[_Waiting[Q, R]]:
        """Who waits, the most urgent first; who has gone is forgotten, who is too late is told."""
        alive = []
        for entry in sorted(self._heap):
            if entry.answer.done():
                continue
            if entry.deadline.expired:
                metrics.RERANK_REFUSED.labels("late").inc()
                entry.answer.set_exception(_too_late())
            else:
                alive.append(entry)
        return alive

    def _fitting(self, cost_N: Sequence[int], first: int, allowed: int) -> int:
        """How many requests from `first` on fit; one that mostly fits is one, for it can be cut."""
        before, tokens = cost_N[first - 1] if first else 0, cost_N[first] - (cost_N[first - 1] if first else 0)
        fitting = bisect.bisect_right(cost_N, before + min(allowed, self._batch_tokens_max)) - first
        return fitting if fitting > 0 else int(2 * allowed >= tokens)


def _given_up(waiting: int) -> Overloaded:
    return Overloaded(
        "rerank queue",
        came=f"{waiting} requests waiting, too many for their deadlines",
        expected="a queue of which all can be in time",
        fix="Take the ranker's order now; add rerank workers if this lasts.",
    )


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded(
        "rerank",
        came="no scores before the deadline",
        expected="a batch in time",
        fix="Take the ranker's order; add rerank workers if this lasts.",
    )
