"""[heavy] RecallMonitor: sampled live queries asked again by the exact scan, in a thread of its own.

Shape legend: B queries, D dimension, K neighbours.
"""

from __future__ import annotations

import queue
import threading
from itertools import count

from recsys.candidates.nearest.base import Keys, Vectors
from recsys.candidates.nearest.engine import yield_cores
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.tuning import recall
from recsys.core import metrics
from recsys.core.attributes import Where
from recsys.models.config import LiveIndexConfig


class RecallMonitor:
    """Watches one LiveIndex. What it cannot keep up with is counted as `dropped`; no query waits for it."""

    def __init__(self, index: LiveIndex, config: LiveIndexConfig) -> None:
        """Samples from now on; config.recall_sample_every 0 samples nothing."""
        self._index, self._every = index, config.recall_sample_every
        self._calls = count(1)
        self._waiting: queue.Queue[tuple[Vectors, int, Where, Keys] | None] = queue.Queue(config.recall_queue_items_max)
        self._thread = threading.Thread(target=self._run, name="recall-monitor", daemon=True)
        if self._every:
            self._thread.start()
            index.on_search = self.offer

    def offer(self, vectors: Vectors, k: int, where: Where, item_key: Keys) -> None:
        """One answered search: its queries [B, D] and the keys [B, K] it gave. Keeps one in `recall_sample_every`."""
        if next(self._calls) % self._every:
            return
        try:
            self._waiting.put_nowait((vectors[:1].copy(), k, where, item_key[:1]))
        except queue.Full:
            metrics.INDEX_RECALL_SAMPLES.labels("dropped").inc()

    def close(self) -> None:
        """Judge what waits, then stop."""
        self._index.on_search = None
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _run(self) -> None:
        yield_cores(1)
        while (sample := self._waiting.get()) is not None:
            vectors, k, where, item_key = sample
            exact = self._index.exact(vectors, k, where)[0]
            metrics.INDEX_RECALL.observe(recall(item_key, exact))
            metrics.INDEX_RECALL_SAMPLES.labels("judged").inc()
