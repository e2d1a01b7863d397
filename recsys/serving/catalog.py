"""The gateway's own reader of the `catalog` topic: prices, stock and listings, whatever becomes of the feature store.

One thread reads and applies, another looks how far the log has come. Without the log the last state stays in force,
and every slate says so once that is too old.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from double11.v1 import admin_pb2

from recsys.core import Clock, Double11Error, EventBatch, VersionMismatch, logging, metrics
from recsys.ranking.live import Applied
from recsys.serving.config import CatalogConfig
from streaming.codec import decode_events
from streaming.config import JobConfig
from streaming.log import Log, RecordBatch

_log = logging.get_logger(__name__)
_CLOSE_S = 2.0
_LOOK_S = 0.02


class Catalog(Protocol):
    """What is fed: a gateway's LiveCatalogue, a worker's LiveItems."""

    trusted: bool

    def apply(self, batch: EventBatch) -> Applied:
        """Take events of the topic."""
        ...

    def num_unavailable(self) -> int:
        """Items that are kept out."""
        ...


class CatalogFollower:
    """Feeds a Catalog from the log. `start`, `wait_caught_up`, `close`."""

    def __init__(
        self, log: Log, topic: str, live: Catalog, clock: Clock, config: CatalogConfig, job: JobConfig
    ) -> None:
        """clock: for the delay metric. job: its future_skew_max_s holds here too, so that features and slates agree."""
        self._consumer_log, self._topic, self.live, self._clock, self._config = log, topic, live, clock, config
        self._skew_us_max = job.future_skew_max_s * 1_000_000
        self._stop = threading.Event()
        self._next: dict[int, int] = {}
        self._target: tuple[float, Mapping[int, int]] | None = None  # when it was asked, and the log's end then
        self._current_s = float("-inf")  # everything that was on the log at this monotonic time is applied
        self._threads = [
            threading.Thread(target=run, name=f"catalog-{name}", daemon=True)
            for name, run in (("follow", self._follow_on), ("watch", self._watch))
        ]

    def start(self, positions: Mapping[int, int] | None = None) -> None:
        """Read the topic from positions [partition -> offset] that are applied already, else from its beginning."""
        self._next = dict(positions or {})
        self._started_s = time.monotonic()
        metrics.CATALOG_LAG_S.set_function(self.lag_s)
        for thread in self._threads:
            thread.start()

    async def wait_caught_up(self) -> bool:
        """Wait until what was there has been applied, at most `catch_up_s_max`; False when it took longer."""
        deadline_s = time.monotonic() + self._config.catch_up_s_max
        while not self.live.trusted:
            if time.monotonic() > deadline_s or self._stop.is_set():
                _log.error("serving_without_whole_catalog", waited_s=self._config.catch_up_s_max)
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    def positions(self) -> Mapping[int, int]:
        """Next offset by partition: everything before it is applied."""
        return self._next.copy()

    def lag_s(self) -> float:
        """Seconds since all that was on the log was last known to be applied; since the start while it never was."""
        return time.monotonic() - max(self._current_s, self._started_s)

    def behind(self) -> bool:
        """Whether slates may show what was sold out longer ago than `lag_s_max`.

        Judged here: who asks the log waits for as long as a broker that is away is waited for.
        """
        if self.live.trusted and self.lag_s() > self._config.lag_s_max:
            self.live.trusted = False
            _log.error("catalog_behind", topic=self._topic, lag_s=round(self.lag_s(), 3))
        return not self.live.trusted

    def status(self) -> admin_pb2.PartStatus:
        """For AdminService."""
        behind = self.behind()
        state, kept_out = "down" if behind else "ok", self.live.num_unavailable()
        detail = f"{self.lag_s():.1f} s behind" if behind else f"{kept_out} items kept out"
        return admin_pb2.PartStatus(name="catalog", state=state, detail=detail)

    def close(self) -> None:
        """Stop reading. A thread that waits for a broker is left to itself."""
        self._stop.set()
        metrics.CATALOG_LAG_S.set_function(lambda: 0.0)
        for thread in self._threads:
            thread.join(_CLOSE_S)

    def _follow_on(self) -> None:
        """Follow, and begin again after a pause when the log has failed us."""
        pause_s = self._config.backoff_s_min
        while not self._stop.is_set():
            began_s = time.monotonic()
            try:
                self._follow()
            except Double11Error as error:
                if isinstance(error, VersionMismatch):  # another log under the same name: read it whole
                    self._next = {}
                if time.monotonic() - began_s > 2 * self._config.backoff_s_max:
                    pause_s = self._config.backoff_s_min
                metrics.CATALOG_RECONNECTS.inc()
                _log.error("catalog_log_away", topic=self._topic, again_in_s=pause_s, error=str(error))
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, self._config.backoff_s_max)

    def _follow(self) -> None:
        bounds = {"records_max": self._config.poll_records_max, "bytes_max": self._config.poll_bytes_max}
        self._next = self._next or dict(self._consumer_log.begin_offsets(self._topic))
        consumer = self._consumer_log.consumer(self._topic, self._next)
        try:
            while not self._stop.is_set():
                batches = consumer.poll(**bounds)
                if batches:
                    self._take(batches)
                self._note_progress()
                if sum(map(len, batches)) < self._config.poll_records_max // 2:
                    self._stop.wait(self._config.poll_ms / 1e3)  # batches of some size cost less than many small ones
        finally:
            consumer.close()

    def _take(self, batches: Sequence[RecordBatch]) -> None:
        """Decode as one batch, leave out what slates must not hear of, apply."""
        values = [v for b in batches for v in b.values]
        append_us = np.concatenate([b.append_us for b in batches])
        decoded = decode_events(values, [h for b in batches for h in b.headers])
        stress = decoded.batch.numpy("stress")
        future = decoded.batch.numpy("event_time") - append_us[decoded.row] > self._skew_us_max
        told = self.live.apply(_kept(decoded.batch, ~(stress | future)))
        for b in batches:
            self._next[b.partition] = b.next_offset
        outcomes = {
            "applied": told.applied,
            "superseded": told.superseded,
            "unknown": told.unknown,
            "stress": int(np.count_nonzero(stress)),
            "future": int(np.count_nonzero(future & ~stress)),
            "rejected": len(decoded.rejected),
        }
        for outcome, number in outcomes.items():
            if number:
                metrics.CATALOG_EVENTS.labels(outcome).inc(number)
        if len(append_us) and self.live.trusted:
            metrics.CATALOG_DELAY_MS.observe(max(self._clock.now_us() - int(append_us.min()), 0) / 1e3)

    def _note_progress(self) -> None:
        """See whether the end that was last asked for is reached."""
        target = self._target
        if target is None or any(self._next.get(p, 0) < end for p, end in target[1].items()):
            return
        self._current_s, self._target = target[0], None
        if not self.live.trusted:
            self.live.trusted = True
            after_s = round(time.monotonic() - self._started_s, 3)
            _log.info("catalog_current", topic=self._topic, kept_out=self.live.num_unavailable(), after_s=after_s)

    def _watch(self) -> None:
        """Ask the log for its end, now and then, and say when we are too far behind it."""
        while not self._stop.is_set():
            asked_s = time.monotonic()
            try:
                ends = self._consumer_log.end_offsets(self._topic)
            except Double11Error as error:
                _log.warning("catalog_end_unknown", topic=self._topic, error=str(error))
            else:
                metrics.CATALOG_LAG_RECORDS.set(sum(max(0, e - self._next.get(p, 0)) for p, e in ends.items()))
                if self._target is None:
                    self._target = (asked_s, ends)
            self.behind()
            self._stop.wait(self._config.watch_s)


def _kept(batch: EventBatch, keep: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> EventBatch:
    return batch if keep.all() else batch.filter(keep)
