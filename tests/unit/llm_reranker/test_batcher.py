"""Earliest deadline first, bounded in tokens and queue; nobody waits forever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_reranker.batcher import Batcher
from llm_reranker.speed import SpeedModel
from recsys.core import BadInput, Deadline, DeadlineExceeded, Double11Error, Internal, Overloaded, metrics


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
    return Batcher(
        recorder.run, lambda ms: 10**9, ThreadPoolExecutor(1), batch_tokens_max=tokens, queue_requests_max=queue
    )


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


def by_seconds(recorder: Recorder) -> Batcher[str, str]:
    """One whose engine computes a token in ten seconds: deadlines of minutes, so that a slow machine says the same."""
    return Batcher(
        recorder.run, lambda ms: int(min(ms, 1e9) / 1e4), ThreadPoolExecutor(1),
        batch_tokens_max=1_000, queue_requests_max=50,
    )  # fmt: skip


async def test_where_all_can_be_in_time_nobody_is_given_up() -> None:
    """The urgent one affords a batch of two; the others have time enough after it."""
    recorder = Recorder()
    later = [("urgent", 10, 2.5e5), *((f"r{i}", 10, 2e6) for i in range(5))]
    assert await gather(by_seconds(recorder), recorder, *later) == ["URGENT", "R0", "R1", "R2", "R3", "R4"]
    assert recorder.batches[1:] == [["urgent", "r0"], ["r1", "r2", "r3", "r4"]]


async def test_where_not_all_can_be_in_time_the_most_urgent_are_given_up_for_the_largest_batch() -> None:
    """Ten requests of 10 tokens; the first two afford 11 tokens, the others 55."""
    recorder, refused = Recorder(), metrics.RERANK_REFUSED.labels("given-up")
    before = refused._value.get()
    later = [*((f"u{i}", 10, 1.1e5 + i) for i in range(2)), *((f"r{i}", 10, 5.5e5 + i) for i in range(8))]
    answers = await gather(by_seconds(recorder), recorder, *later)
    assert [type(a) for a in answers[:2]] == [Overloaded, Overloaded]
    assert recorder.batches[1] == ["r0", "r1", "r2", "r3", "r4"]
    assert answers[2:7] == ["R0", "R1", "R2", "R3", "R4"]
    assert refused._value.get() - before >= 2


async def test_one_that_mostly_fits_is_cut_and_not_given_up_for_another_one() -> None:
    recorder = Recorder()
    answers = await gather(by_seconds(recorder), recorder, ("a", 10, 8e4), ("b", 10, 1.5e5))
    assert answers == ["A", "B"]


async def test_callers_that_have_gone_make_room_in_a_full_queue() -> None:
    recorder = Recorder()
    batcher = make(recorder, queue=2)
    first = asyncio.create_task(batcher.submit("first", 1, Deadline.never()))
    while not recorder.batches:
        await asyncio.sleep(0)
    gone = [asyncio.create_task(batcher.submit(x, 1, Deadline.never())) for x in ("x", "y")]
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    stays = asyncio.create_task(batcher.submit("stays", 1, Deadline.never()))
    await asyncio.sleep(0)
    recorder.release.set()
    assert (await first, await stays) == ("FIRST", "STAYS")
    assert recorder.batches == [["first"], ["stays"]]


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
    assert speed.affordable_tokens(10) == pytest.approx(120, abs=1)
    assert speed.affordable_tokens(float("inf")) > 10**9
    for _ in range(40):
        speed.observe(220, 26.0)  # the machine has become twice as slow
    assert speed.affordable_tokens(10) == pytest.approx(40, abs=2)
    assert speed.affordable_tokens(1) <= 0
    for _ in range(60):
        speed.refused()
    assert speed.affordable_tokens(1) > 0  # it tries again
