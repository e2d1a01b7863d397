"""The stacked windows: which stretches of the past the ranker learns from (design, replay protocol)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.core import BadInput

DAY_US, HOUR_US = 86_400_000_000, 3_600_000_000
_SPAN_SHARE = 10  # a window is a tenth of the data's span
_DAYS_MIN, _DAYS_MAX = 1, 30
_LENGTHS_MIN = 3  # of history, training and validation: one window's length each
_STRAYS_MAX = 5  # at either end, and no more than a hundredth; of large data a ten-thousandth


@dataclass(frozen=True, order=True, slots=True)
class Window:
    """[from_us, to_us): features and sources see events before from_us, labels are actions inside. Microseconds UTC."""

    from_us: int
    to_us: int


def span_us(time_us: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The first and the last of event times [N], N > 0, but for a few strays: one wrong clock would decide the windows.

    Strays are further away from all but a few than these are from each other, and further than a day. Microseconds.
    """
    ordered, num = np.sort(time_us), len(time_us)
    few = max(min(num // 100, _STRAYS_MAX), num // 10_000)
    inner = ordered[few : num - few]
    reach_us = max(inner[-1] - inner[0], DAY_US)
    near = ordered[(ordered >= inner[0] - reach_us) & (ordered <= inner[-1] + reach_us)]
    return int(near[0]), int(near[-1])


def window_length_us(first_event_us: int, until_us: int, days: float = 0.0) -> int:
    """A tenth of the span, at least 1 and at most 30 days; `days` > 0 says otherwise. Microseconds.

    Data of fewer days than windows of a day need is divided by ten all the same, down to an hour.
    """
    if days > 0:
        return int(days * DAY_US)
    tenth_us = (until_us - first_event_us) // _SPAN_SHARE
    if until_us - first_event_us < _LENGTHS_MIN * _DAYS_MIN * DAY_US and tenth_us >= HOUR_US:
        return tenth_us
    return min(max(tenth_us, _DAYS_MIN * DAY_US), _DAYS_MAX * DAY_US)


def stacked(first_event_us: int, until_us: int, *, windows: int, length_us: int) -> list[Window]:
    """The last `windows` windows of `length_us` that end at `until_us` back to back, oldest first.

    Each leaves at least as much history before it as the window is long, so short data gives fewer windows.
    Raises: BadInput when not even two windows fit: one to train on, one to validate.
    """
    fitting = (until_us - first_event_us) // length_us - 1
    if fitting < _LENGTHS_MIN - 1:
        raise BadInput(
            "training windows",
            came=f"{(until_us - first_event_us) / DAY_US:.2f} days of events, windows of {length_us / DAY_US:.2f} days",
            expected="at least three window lengths of events before --until",
            fix="Pass a shorter --window-days, a later --until, or more data.",
        )
    count = min(windows, fitting)
    return [Window(until_us - (i + 1) * length_us, until_us - i * length_us) for i in reversed(range(count))]
