"""Admission: the limit holds, the queue is bounded, ordered by priority, and gives its places back."""

import asyncio

import pytest

from recsys.core import Deadline, DeadlineExceeded, Overloaded
from recsys.serving.admission import Admission
from recsys.serving.config import AdmissionConfig


def admission(limit=1, queue=2, wait_ms=5_000.0):
    return Admission(AdmissionConfig(in_flight_limit=limit, queue_items_max=queue, queue_wait_ms_max=wait_ms))


class Holder:
    """A request that stays admitted until released."""

    def __init__(self, gate, priority=5, deadline=None):
        self.admitted = asyncio.Event()
        self.release = asyncio.Event()
        self.task = asyncio.create_task(self._run(gate, priority, deadline or Deadline.never()))

    async def _run(self, gate, priority, deadline):
        async with gate.admitted(priority, deadline):
            self.admitted.set()
            await self.release.wait()

    async def finish(self):
        self.release.set()
        await self.task


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_limit_holds_and_the_queue_moves_up():
    gate = admission(limit=2, queue=5)
    holders = [Holder(gate) for _ in range(4)]
    await settle()
    assert [h.admitted.is_set() for h in holders] == [True, True, False, False]
    assert gate.in_flight == 2
    await holders[0].finish()
    await settle()
    assert holders[2].admitted.is_set()
    assert gate.in_flight == 2
    for h in holders[1:]:
        await h.finish()
    assert gate.in_flight == 0


async def test_full_queue_refuses_the_newcomer_at_once():
    gate = admission(queue=1)
    first, waiting = Holder(gate), Holder(gate)
    await settle()
    with pytest.raises(Overloaded, match="1 in flight and 1 waiting"):
        async with gate.admitted(5, Deadline.never()):
            pass
    await first.finish()
    await waiting.finish()


async def test_more_important_newcomer_pushes_out_the_last():
    gate = admission(queue=1)
    first, unimportant = Holder(gate), Holder(gate, priority=0)
    await settle()
    important = Holder(gate, priority=9)
    with pytest.raises(Overloaded):
        await unimportant.task
    await first.finish()
    await settle()
    assert important.admitted.is_set()
    await important.finish()


async def test_priority_first_then_arrival():
    gate = admission(queue=5)
    first = Holder(gate)
    await settle()
    usual, urgent, usual_later = Holder(gate, 5), Holder(gate, 9), Holder(gate, 5)
    await settle()
    order = []
    for _ in range(3):
        await first.finish()
        await settle()
        first = next(h for h in (usual, urgent, usual_later) if h.admitted.is_set() and h not in order)
        order.append(first)
    assert order == [urgent, usual, usual_later]
    await first.finish()


async def test_waiting_too_long_is_a_refusal_and_leaves_no_trace():
    gate = admission(wait_ms=1.0)
    first = Holder(gate)
    await settle()
    with pytest.raises(Overloaded, match="a wait of more than 1 ms"):
        async with gate.admitted(5, Deadline.never()):
            pass
    await first.finish()
    assert gate.in_flight == 0


async def test_deadline_passing_in_the_queue_is_deadline_exceeded():
    gate = admission()
    first = Holder(gate)
    await settle()
    with pytest.raises(DeadlineExceeded):
        async with gate.admitted(5, Deadline.after_ms(1)):
            pass
    await first.finish()
    assert gate.in_flight == 0


async def test_cancelled_waiter_gives_its_place_back():
    gate = admission()
    first, second = Holder(gate), Holder(gate)
    await settle()
    first.release.set()
    await first.task  # the place has been handed to `second`, which has not run yet
    second.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    assert gate.in_flight == 0


async def test_raising_the_limit_lets_waiters_in_at_once():
    gate = admission(limit=1)
    holders = [Holder(gate) for _ in range(3)]
    await settle()
    gate.limit = 3
    await settle()
    assert all(h.admitted.is_set() for h in holders)
    for h in holders:
        await h.finish()
