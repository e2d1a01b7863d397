"""Clocks never run backwards; deadlines shrink and never grow."""

import math
import time

import pytest

from recsys.core import DataClock, Deadline, DeadlineExceeded, ManualClock, Unavailable, WallClock


def test_wall_clock_holds_its_value_while_the_machine_steps_back() -> None:
    readings = iter([5_000_000, 3_000_000, 4_999_000, 6_000_000])
    clock = WallClock(lambda: next(readings))
    assert [clock.now_us() for _ in range(4)] == [5_000, 5_000, 5_000, 6_000]


def test_wall_clock_is_the_machines() -> None:
    assert abs(WallClock().now_us() - time.time_ns() // 1000) < 1_000_000


def test_data_clock_sees_the_newest_event_and_survives_an_emptied_store() -> None:
    newest = [1_000]
    clock = DataClock(lambda: newest[0])
    assert clock.now_us() == 1_001
    newest[0] = 0
    assert clock.now_us() == 1_001
    newest[0] = 2_000
    assert clock.now_us() == 2_001


def test_manual_clock_stands_still() -> None:
    clock = ManualClock(7)
    assert clock.now_us() == clock.now_us() == 7


def test_deadline_never_has_no_timeout() -> None:
    never = Deadline.never()
    assert never.timeout_s() is None
    assert math.isinf(never.remaining_ms())
    assert not never.expired
    never.require("a thing")


def test_expired_deadline_says_so_everywhere() -> None:
    late = Deadline.after_ms(-5)
    assert late.expired
    assert late.timeout_s() == 0.0
    assert late.remaining_ms() < 0
    with pytest.raises(DeadlineExceeded, match="ms past the deadline"):
        late.require("ranking")


def test_capped_is_the_earlier_of_both() -> None:
    assert Deadline.after_ms(10_000).capped(50).remaining_ms() <= 50
    assert Deadline.after_ms(50).capped(10_000).remaining_ms() <= 50
    assert Deadline.never().capped(50).timeout_s() is not None


def test_data_clock_stands_still_while_the_store_is_away():
    answers = [41, None, 43]

    def newest():
        if (found := answers.pop(0)) is None:
            raise Unavailable("store", came="nothing", expected="an answer", fix="Start it.")
        return found

    clock = DataClock(newest)
    assert [clock.now_us() for _ in range(3)] == [42, 42, 44]
    answers.append(None)
    with pytest.raises(Unavailable):
        DataClock(newest).now_us()
