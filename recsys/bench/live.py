"""[heavy] Queries at a steady rate while a thread writes to the live index: latency from the intended time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.bench.harness import Row, figure
from recsys.candidates.nearest.live import LiveIndex
from recsys.core import Overloaded
from recsys.core.attributes import EVERYTHING, Attributes, Where

_K, _QUERIES_PER_S, _UPSERTS_PER_S, _TICK_S = 100, 100, 1_000, 0.01
_LOOK_EVERY = 50  # batches of a writer, to see whether what it wrote is found
Vectors = npt.NDArray[np.float32]


def under_writes(live: LiveIndex, fresh: Vectors, asked: Vectors, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Latency without and with 1,000 upserts a second (half of them of items that are there), one delete in ten.

    Every second query has a price range, of a tenth or a half of the items. fresh: vectors to write, taken in turn.
    Written in what has come up every 10 ms, as the catalogue's follower writes what it has read.
    """
    seconds = 1.0 if quick else 45.0
    top = 2 * len(live)
    wheres = [EVERYTHING, Where(price_max_minor=top // 10), EVERYTHING, Where(price_min_minor=top // 2)]
    prices = np.random.default_rng(5).integers(0, top, top // 2)
    live.update(np.arange(len(prices)), price_minor=prices)
    _ask(live, asked, wheres, 0.5)
    quiet, alone = _ask(live, asked, wheres, min(seconds, 15.0))
    writer = _Writer(live, fresh, top)
    writer.thread.start()
    busy, spent = _ask(live, asked, wheres, seconds)
    writer.done.set()
    writer.thread.join()
    rows = []
    for what, unlike, like in (("latency", busy, quiet), ("CPU time of a query", spent, alone)):
        rows += [
            figure(f"{what} p{q}, {_UPSERTS_PER_S} upserts/s", "ms", _percentile(unlike, q), peer=_percentile(like, q))
            for q in (50, 99)
        ]
    rows += [
        figure("upserts written", "per_s", writer.written / writer.seconds, limit=float(_UPSERTS_PER_S)),
        figure("upsert p99, due to visible", "ms", _percentile(writer.visible_ms, 99)),
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
    def __init__(self, live: LiveIndex, fresh: Vectors, top: int) -> None:
        self._live, self._fresh, self._top = live, fresh, top
        self.done, self.thread = threading.Event(), threading.Thread(target=self._run)
        self.visible_ms: list[float] = []
        self.written = self.seen = self.looked = self.rebuilds = self.refused = 0
        self.seconds = 0.0

    def _run(self) -> None:
        rng, started, base = np.random.default_rng(4), time.perf_counter(), self._live._state.base
        batches = 0
        while not self.done.is_set():
            now_s = time.perf_counter() - started
            due = min(int(now_s * _UPSERTS_PER_S) - self.written, len(self._fresh))
            if not due:
                time.sleep(_TICK_S)
                continue
            item_key = rng.choice(self._top, due, replace=False)  # half of them are there
            vectors = self._fresh.take(np.arange(self.written, self.written + due), axis=0, mode="wrap")
            try:
                self._live.upsert(item_key, vectors, Attributes.of(due, price_minor=item_key))
            except Overloaded:
                self.refused += 1
                time.sleep(_TICK_S)
                continue
            late_s = time.perf_counter() - started - np.arange(self.written, self.written + due) / _UPSERTS_PER_S
            self.visible_ms += (late_s * 1e3).tolist()
            self.written, batches = self.written + due, batches + 1
            if batches % _LOOK_EVERY == 0:
                self.looked += 1
                self.seen += int(item_key[-1]) in self._live.search(vectors[-1:], _K)[0]
            self._live.delete(item_key[::10])
            if self._live._state.base is not base:
                base, self.rebuilds = self._live._state.base, self.rebuilds + 1
        self.seconds = time.perf_counter() - started


def _ask(live: LiveIndex, asked: Vectors, wheres: Sequence[Where], seconds: float) -> tuple[list[float], list[float]]:
    """Milliseconds of queries sent at a steady rate, whatever became of the ones before: latencies, and CPU times.

    The CPU time says what a query costs where the machine has other work: no waiting is in it.
    """
    started, latency, spent = time.perf_counter(), list[float](), list[float]()
    for i in range(max(int(seconds * _QUERIES_PER_S), 1)):
        intended = started + i / _QUERIES_PER_S
        if (wait := intended - time.perf_counter()) > 0:
            time.sleep(wait)
        began = time.thread_time()
        live.search(asked[i % len(asked)][None], _K, wheres[i % len(wheres)])
        spent.append((time.thread_time() - began) * 1e3)
        latency.append((time.perf_counter() - intended) * 1e3)
    return latency, spent


def _percentile(values: list[float], q: int) -> float:
    return float(np.percentile(values, q)) if values else float("nan")
