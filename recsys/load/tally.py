"""What a load run observed, and its report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from hdrh.histogram import HdrHistogram

_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 600_000_000, 3
_PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One request. Times in seconds from the start; latency = finished - intended.

    status: a gRPC status name, or "OK". tier: its label when OK.
    """

    intended_s: float
    sent_s: float
    finished_s: float
    status: str
    tier: str = ""
    fallbacks: tuple[str, ...] = ()


class Tally:
    """Counts outcomes. Latencies are kept in HDR histograms, memory is independent of the number of requests."""

    def __init__(self, deadline_ms: float, duration_s: float) -> None:
        self._deadline_s = deadline_ms / 1e3
        self._answered, self._lag = _histogram(), _histogram()
        self._by_tier: dict[str, HdrHistogram] = {}
        self._statuses: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._seconds = [[0, 0] for _ in range(int(duration_s) + 1)]  # by intended second: requests, good ones
        self.good = 0

    def add(self, outcome: Outcome) -> None:
        """Count one request."""
        latency_s = outcome.finished_s - outcome.intended_s
        second = self._seconds[min(int(outcome.intended_s), len(self._seconds) - 1)]
        second[0] += 1
        self._statuses[outcome.status] += 1
        _record(self._lag, outcome.sent_s - outcome.intended_s)
        if outcome.status != "OK":
            return
        self._fallbacks.update(outcome.fallbacks)
        _record(self._answered, latency_s)
        _record(self._by_tier.setdefault(outcome.tier, _histogram()), latency_s)
        if latency_s <= self._deadline_s:
            self.good += 1
            second[1] += 1

    def report(self, duration_s: float) -> dict[str, Any]:
        """The measured part of the report: counts, goodput, latency of answers in ms, generator lag in ms."""
        requests = sum(self._statuses.values())
        return {
            "requests": requests,
            "offered_per_s": round(requests / duration_s, 3),
            "goodput_per_s": round(self.good / duration_s, 3),
            "within_deadline": self.good,
            "statuses": dict(self._statuses),
            "latency_ms": _percentiles(self._answered),
            "tiers": {
                tier: {"answers": h.get_total_count(), "latency_ms": _percentiles(h)}
                for tier, h in sorted(self._by_tier.items())
            },
            "fallbacks": dict(self._fallbacks),
            "generator_lag_ms": _percentiles(self._lag),
            "seconds": [
                {"second": s, "requests": counts[0], "within_deadline": counts[1]}
                for s, counts in enumerate(self._seconds)
            ],
        }


def _histogram() -> HdrHistogram:
    return HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)


def _record(histogram: HdrHistogram, seconds: float) -> None:
    histogram.record_value(min(max(int(seconds * 1e6), _LOWEST_US), _HIGHEST_US))


def _percentiles(histogram: HdrHistogram) -> dict[str, float | None]:
    if not histogram.get_total_count():
        return dict.fromkeys(_PERCENTILES)
    return {name: histogram.get_value_at_percentile(p) / 1e3 for name, p in _PERCENTILES.items()}
