"""Earliest deadline first, bounded in tokens and queue; nobody waits forever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_reranker.batcher import Batcher
from llm_reranker.speed import SpeedModel
from recsys.core import BadInput, Deadline, DeadlineExceeded, Double11Error, Internal, Overloaded


class Recorder:
    """Runs batches and keeps them; holds the first until released."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.release = threading.Event()

    def run(self, requests: Sequence[str], queue_ms: Sequence[float], tokens: int) -> list[str | Double11Error]:
        self.batches.append(list(requests))
        self.release.wait(5)
        if "boom" in requests:
            raise ZeroDivisionError("in the engine")
        bad = BadInput("x", came=1, expected="2", fix="3")
        return [bad if r == "bad" else r.upper() for r in requests]


def make(recorder: Recorder, tokens: int = 100, queue: int = 8) -> Batcher[str, str]:
    return Batcher(recorder.run, lambda ms: tokens, ThreadPoolExecutor(1), queue_requests_max=queue)


async def gather(batcher: Batcher[str, str], recorder: Recorder, *later: tuple[str, int, float]) -> list[object]:
    """Occupy the engine with one request, queue the others behind it, then let go."""
    first = asyncio.create_task(batcher.submit("first", 1, Deadline.never()))
    while not recorder.batches:
        await asyncio.sleep(0)
    tasks = [asyncio.create_task(batcher.submit(r, t, Deadline.after_ms(ms))) for r, t, ms in later]
    await asyncio.sleep(0)
    recorder.release.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_most_urgent_go_first_and_batches_keep_their_tokens() -> None:
    recorder = Recorder()
    answers = await gather(make(recorder), recorder, ("c", 60, 9e5), ("a", 60, 1e5), ("b", 30, 5e5), ("d", 50, 9.5e5))
    assert answers == ["C", "A", "B", "D"]
    assert recorder.batches == [["first"], ["a", "b"], ["c"], ["d"]]


async def test_a_request_larger_than_a_batch_goes_alone() -> None:
    recorder = Recorder()
    assert await gather(make(recorder), recorder, ("huge", 10_000, 1e6)) == ["HUGE"]


async def test_an_expired_request_is_dropped_unscored() -> None:
    recorder = Recorder()
    batcher = make(recorder)
    first = asyncio.create_task(batcher.submit("first", 1, Deadline.never()))
    while not recorder.batches:
        await asyncio.sleep(0)
    deadline = Deadline.after_ms(5)
    late = asyncio.create_task(batcher.submit("late", 1, deadline))
    await asyncio.sleep(0)
    while not deadline.expired:
        await asyncio.sleep(0)
    recorder.release.set()
    with pytest.raises(DeadlineExceeded):
        await late
    assert await first == "FIRST"
    assert recorder.batches == [["first"]]


async def test_a_full_queue_refuses() -> None:
    recorder = Recorder()
    later = [(f"r{i}", 1, 1e6) for i in range(4)]
    answers = await gather(make(recorder, queue=2), recorder, *later)
    assert answers[:2] == ["R0", "R1"]
    assert all(isinstance(a, Overloaded) for a in answers[2:])


async def test_one_bad_request_fails_alone_and_a_broken_engine_fails_the_batch() -> None:
    recorder = Recorder()
    answers = await gather(make(recorder, tokens=2), recorder, ("bad", 1, 1e5), ("good", 1, 2e5), ("boom", 2, 3e5))
    assert isinstance(answers[0], BadInput)
    assert answers[1] == "GOOD"
    assert isinstance(answers[2], Internal)
    assert await make(recorder).submit("after", 1, Deadline.never()) == "AFTER"


def test_a_batcher_outlives_an_event_loop() -> None:
    recorder = Recorder()
    recorder.release.set()
    batcher = make(recorder)
    assert [asyncio.run(batcher.submit(x, 1, Deadline.never())) for x in ("a", "b")] == ["A", "B"]


def test_speed_is_a_line_and_adapts() -> None:
    speed = SpeedModel.from_two((20, 3.0), (220, 13.0))
    assert (speed.fixed_ms, speed.token_ms) == (pytest.approx(2.0), pytest.approx(0.05))
    assert speed.affordable_tokens(10, 10_000) == pytest.approx(120, abs=1)
    assert speed.affordable_tokens(float("inf"), 8192) == 8192
    for _ in range(40):
        speed.observe(220, 26.0)  # the machine has become twice as slow
    assert speed.affordable_tokens(10, 10_000) == pytest.approx(40, abs=2)
    assert speed.affordable_tokens(1, 10_000) <= 0
    for _ in range(60):
        speed.refused()
    assert speed.affordable_tokens(1, 10_000) > 0  # it tries again
