"""[heavy] Queries at a steady rate while a thread writes to the live index: latency from the intended time."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bench.harness import Row, figure
from recsys.candidates.nearest.live import LiveIndex

_K, _QUERIES_PER_S, _UPSERTS_PER_S, _TICK_S = 100, 100, 1_000, 0.01
Vectors = npt.NDArray[np.float32]


def under_writes(live: LiveIndex, fresh: Vectors, asked: Vectors, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Latency without and with 1,000 upserts a second (half of them of items that are there), one delete in ten.

    fresh: vectors to write, taken in turn.
    """
    seconds = 1.0 if quick else 45.0
    _ask(live, asked, 0.5)
    quiet, _ = _ask(live, asked, min(seconds, 15.0))
    writer = _Writer(live, fresh)
    writer.thread.start()
    busy, spent = _ask(live, asked, seconds)
    writer.done.set()
    writer.thread.join()
    rows = [
        figure(f"latency p{q}, {_UPSERTS_PER_S} upserts/s", "ms", _percentile(busy, q), peer=_percentile(quiet, q))
        for q in (50, 99)
    ]
    rows += [
        figure("CPU time of a query p99, the same", "ms", _percentile(spent, 99)),
        figure("upserts written", "per_s", writer.written / writer.seconds, limit=float(_UPSERTS_PER_S)),
        figure("upsert call p99, visible on return", "ms", _percentile(writer.took_ms, 99)),
        figure("written items found by the next query", "share", writer.seen / max(writer.looked, 1), limit=1.0),
    ]
    facts = {
        "seconds": seconds,
        "queries_per_s": _QUERIES_PER_S,
        "rebuilds": writer.rebuilds,
        "refused": writer.refused,
    }
    return rows, facts


class _Writer:
    def __init__(self, live: LiveIndex, fresh: Vectors) -> None:
        self._live, self._fresh = live, fresh
        self.done, self.thread = threading.Event(), threading.Thread(target=self._run)
        self.took_ms: list[float] = []
        self.written = self.seen = self.looked = self.rebuilds = self.refused = 0
        self.seconds = 0.0

    def _run(self) -> None:
        from recsys.core import Overloaded

        rng, started, base = np.random.default_rng(4), time.perf_counter(), self._live._state.base
        top = 2 * len(base.index)
        while not self.done.is_set():
            due = int((time.perf_counter() - started) * _UPSERTS_PER_S) - self.written
            if not due:
                time.sleep(_TICK_S)
                continue
            for _ in range(due):
                vector = self._fresh[self.written % len(self._fresh)]
                item_key = int(rng.integers(0, top))  # half of them are there
                called = time.perf_counter()
                try:
                    self._live.upsert(np.array([item_key]), vector[None])
                except Overloaded:
                    self.refused += 1
                    time.sleep(_TICK_S)
                    break
                self.took_ms.append((time.perf_counter() - called) * 1e3)
                self.written += 1
                if self.written % 500 == 0:
                    self.looked += 1
                    self.seen += item_key in self._live.search(vector[None], _K)[0]
                if self.written % 10 == 0:
                    self._live.delete(np.array([item_key]))
            if self._live._state.base is not base:
                base, self.rebuilds = self._live._state.base, self.rebuilds + 1
        self.seconds = time.perf_counter() - started


def _ask(live: LiveIndex, asked: Vectors, seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of queries sent at a steady rate, whatever became of the ones before: latencies, and CPU times.

    The CPU time says what a query costs where the machine has other work: no waiting is in it.
    """
    started, latency, spent = time.perf_counter(), list[float](), list[float]()
    for i in range(max(int(seconds * _QUERIES_PER_S), 1)):
        intended = started + i / _QUERIES_PER_S
        if (wait := intended - time.perf_counter()) > 0:
            time.sleep(wait)
        began = time.thread_time()
        live.search(asked[i % len(asked)][None], _K)
        spent.append((time.thread_time() - began) * 1e3)
        latency.append((time.perf_counter() - intended) * 1e3)
    return latency, spent


def _percentile(values: list[float], q: int) -> float:
    return float(np.percentile(values, q)) if values else float("nan")
