import numpy as np
import pytest

from recsys.core import BadInput
from recsys.training import TrainingConfig
from recsys.training.windows import DAY_US, HOUR_US, Window, span_us, stacked, window_length_us


@pytest.mark.parametrize(("days", "length"), [(2, 0.2), (4, 1), (9, 1), (138, 13.8), (240, 24), (600, 30)])
def test_a_window_is_a_tenth_of_the_span_within_bounds(days, length):
    assert window_length_us(0, days * DAY_US) == length * DAY_US


@pytest.mark.parametrize("strays", [[-8_000], [2_000], [-8_000, -7_990, 27_000]])
def test_a_few_events_far_away_from_all_others_do_not_count(strays):
    times = np.sort(np.random.default_rng(0).integers(0, 20 * DAY_US, 2_000))
    stray = np.array(strays) * DAY_US
    assert span_us(np.concatenate([stray, times])) == span_us(times) == (times[0], times[-1])


@pytest.mark.parametrize(
    "days",
    [
        np.arange(20) ** 3,  # too few to tell which are strays
        np.concatenate([[-10, -6], np.arange(2_000) / 100]),  # a slow beginning
        np.concatenate([[-0.9], np.full(2_000, 0.0)]),  # all at once
        np.concatenate([np.full(10, -8_000), np.arange(900)]),  # more than a few
    ],
)
def test_the_span_is_that_of_all_events_where_none_is_a_stray(days):
    times = (days * DAY_US).astype(np.int64)
    assert span_us(times) == (times.min(), times.max())


def test_windows_lie_back_to_back_before_until():
    windows = stacked(0, 100 * DAY_US, windows=3, length_us=10 * DAY_US)
    assert windows == [Window((70 + 10 * i) * DAY_US, (80 + 10 * i) * DAY_US) for i in range(3)]


def test_short_data_gives_fewer_windows_and_too_short_is_refused():
    assert len(stacked(0, 4 * DAY_US, windows=5, length_us=DAY_US)) == 3
    assert stacked(0, 4 * DAY_US, windows=5, length_us=30 * HOUR_US)[0].from_us >= 30 * HOUR_US
    with pytest.raises(BadInput, match="window-days"):
        stacked(0, 2 * DAY_US, windows=5, length_us=DAY_US)


@pytest.mark.parametrize("days", [1e-13, -1.0, 400.0, float("nan")])
def test_windows_of_no_length_or_none_are_refused(days):
    with pytest.raises(BadInput, match=r"training\.window_days"):
        TrainingConfig(window_days=days)
