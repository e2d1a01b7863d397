"""Arrivals follow their shape; the tally counts from the intended time."""

import numpy as np
import pytest

from recsys.core import BadInput
from recsys.load import arrivals
from recsys.load.tally import Outcome, Tally


def rng():
    return np.random.default_rng(7)


def test_const_is_poisson_at_the_rate():
    at = arrivals("const", 500.0, 60.0, rng())
    assert len(at) == pytest.approx(30_000, rel=0.03)
    assert np.all(np.diff(at) >= 0)
    assert 0 <= at[0] <= at[-1] <= 60
    gaps = np.diff(at)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential


def test_step_is_ten_times_in_the_middle_third():
    at = arrivals("step", 100.0, 30.0, rng())
    counts = np.histogram(at, bins=[0, 10, 20, 30])[0]
    assert counts == pytest.approx([1_000, 10_000, 1_000], rel=0.1)


def test_double11_peaks_right_after_midnight():
    at = arrivals("double11", 100.0, 100.0, rng())
    counts = np.histogram(at, bins=100, range=(0, 100))[0]
    assert 40 <= int(counts.argmax()) <= 52
    assert counts[:20].mean() == pytest.approx(100, rel=0.1)
    assert counts[44:46].mean() == pytest.approx(990, rel=0.1)


def test_same_seed_same_times():
    assert np.array_equal(arrivals("step", 50.0, 5.0, rng()), arrivals("step", 50.0, 5.0, rng()))


@pytest.mark.parametrize(
    ("shape", "rate", "duration", "message"),
    [
        ("spike", 1.0, 1.0, "--shape: got spike"),
        ("const", 0.0, 1.0, "--rate: got 0"),
        ("const", float("nan"), 1.0, "--rate: got nan"),
        ("const", 1.0, -1.0, "--duration: got -1"),
        ("const", 100_000.0, 86_400.0, "requests"),
    ],
)
def test_bad_plans_are_refused(shape, rate, duration, message):
    with pytest.raises(BadInput, match=message):
        arrivals(shape, rate, duration, rng())


def test_latency_counts_from_the_intended_time_not_from_sending():
    tally = Tally(deadline_ms=100.0, duration_s=2.0)
    tally.add(Outcome(intended_s=0.0, sent_s=0.0, finished_s=0.05, status="OK", tier="full"))
    tally.add(
        Outcome(intended_s=1.0, sent_s=1.4, finished_s=1.41, status="OK", tier="rank", fallbacks=("rerank:timeout",))
    )
    tally.add(Outcome(intended_s=1.0, sent_s=1.0, finished_s=1.001, status="RESOURCE_EXHAUSTED"))
    report = tally.report(2.0)
    assert report["requests"] == 3
    assert report["within_deadline"] == 1
    assert report["statuses"] == {"OK": 2, "RESOURCE_EXHAUSTED": 1}
    assert report["tiers"]["rank"]["latency_ms"]["p50"] == pytest.approx(410, rel=0.01)
    assert report["generator_lag_ms"]["max"] == pytest.approx(400, rel=0.01)
    assert report["fallbacks"] == {"rerank:timeout": 1}
    assert [s["requests"] for s in report["seconds"]][:2] == [1, 2]


def test_no_answers_gives_nulls_not_zeroes():
    assert Tally(100.0, 1.0).report(1.0)["latency_ms"]["p99"] is None
