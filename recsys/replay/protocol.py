"""The two protocols of a replay, one code path: fold what came before a query's time, then ask every arm.

`frozen` has one query time, the cut. `online` has many: between two of them the store takes in what happened, the same
for every arm. Nothing that happened, or was learnt, at or after a query's time is ever in the store when it is asked.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.online.memory import MemoryStore
from recsys.core import Deadline, EventBatch, ManualClock, Query, Slate
from recsys.core.items import ItemTable
from recsys.core.progress import bar
from recsys.pipeline import Cascade
from recsys.ranking.live import LiveCatalogue

ReplayProtocol = Literal["frozen", "online"]
PROTOCOLS: tuple[ReplayProtocol, ...] = ("frozen", "online")
SLATE_SCHEMA = {
    "arm": pl.String(),
    "query_id": pl.String(),
    "user_id": pl.String(),
    "rank": pl.Int32(),
    "item_id": pl.String(),
    "score": pl.Float64(),
}


@dataclass(kw_only=True)
class Answers:
    """What one arm said. slates: SLATE_SCHEMA frames in query order. latency_ms: one per query.

    fallback_reasons: how often each reason was given; fallbacks: queries with at least one. rerank_weight: the
    reranker's say in the order, None for an arm without one.
    """

    slates: list[pl.DataFrame] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    fallback_reasons: Counter[str] = field(default_factory=Counter)
    fallbacks: int = 0
    rerank_weight: float | None = None


class Past:
    """A feature store and a catalogue that are brought forward in time: all that was known before `until`, no more."""

    def __init__(self, batches: Iterator[EventBatch], items: ItemTable | None = None) -> None:
        """batches: in event-time order. items: the run's, whose stock serving knows from the catalogue stream.

        Without them what is sold out is known from the store alone, after the sources' quotas are filled.
        """
        self.store = MemoryStore()
        self.live = None if items is None else LiveCatalogue(items)
        if self.live is not None:
            self.live.trusted = True
        self._batches = _as_known(batches)
        self._rest = EventBatch.empty()

    def advance(self, until_us: int) -> int:
        """Fold the events that had happened and were known before until_us and are not folded yet; returns how many."""
        folded = 0
        while True:
            if not len(self._rest):
                following = next(self._batches, None)
                if following is None:
                    return folded
                self._rest = following
            due = int(np.searchsorted(_known_us(self._rest), until_us, side="left"))
            if due:
                self.store.apply(self._rest.slice(0, due))
                if self.live is not None:
                    self.live.apply(self._rest.slice(0, due))
                folded += due
            pending = len(self._rest) - due
            self._rest = self._rest.slice(due, pending)
            if pending:
                return folded


def _as_known(batches: Iterator[EventBatch]) -> Iterator[EventBatch]:
    """Events in event-time order, in the order in which they became known."""
    unknown = EventBatch.empty()
    for batch in batches:
        both = EventBatch.concat([unknown, batch])
        known_us = _known_us(both)
        order = np.argsort(known_us, kind="stable")
        # what is still to come becomes known when it happens at the earliest: not before this batch's end
        due = int(np.searchsorted(known_us[order], batch.numpy("event_time")[-1], side="right"))
        unknown = both.take(order[due:])
        yield both.take(order[:due])
    yield unknown


def _known_us(batch: EventBatch) -> npt.NDArray[np.int64]:
    known_us: npt.NDArray[np.int64] = np.maximum(batch.numpy("event_time"), batch.numpy("known_at"))
    return known_us


async def ask(
    arms: Mapping[str, Cascade], queries: pl.DataFrame, past: Past, clock: ManualClock, *, k: int, new_only: bool
) -> dict[str, Answers]:
    """Ask every arm every query, without a deadline.

    queries: the columns of `recsys.evaluation.make_queries`, sorted by query_time. Arms take turns on each query, so
    that their latencies are measured side by side; one is in flight at a time, because arms compute in this process
    and more would only be in each other's way. The very first answer of an arm pays for its set-up and is given twice.
    """
    task = Query(user_id="", as_of_us=0, new_only=new_only)
    answers = {
        name: Answers(rerank_weight=None if cascade.reranker is None else cascade.rerank_weights.of(task))
        for name, cascade in arms.items()
    }
    with bar(total=len(queries) * len(arms), what="replay", unit="slate") as progress:
        for row in queries.iter_rows(named=True):
            clock.at_us = int(row["query_time"])
            past.advance(clock.at_us)
            for name, cascade in arms.items():
                if not answers[name].latency_ms:
                    await _one(cascade, row, k=k, new_only=new_only)
                slate, latency_ms = await _one(cascade, row, k=k, new_only=new_only)
                _record(answers[name], name, row, slate, latency_ms)
                progress.update(1)
    return answers


async def _one(cascade: Cascade, row: Mapping[str, Any], *, k: int, new_only: bool) -> tuple[Slate, float]:
    query = Query(
        user_id=row["user_id"], as_of_us=row["query_time"], limit=k, request_id=row["query_id"], new_only=new_only
    )
    started = time.perf_counter()
    slate = await cascade.recommend(query, Deadline.never())
    return slate, (time.perf_counter() - started) * 1e3


def _record(to: Answers, arm: str, row: Mapping[str, Any], slate: Slate, latency_ms: float) -> None:
    n = len(slate.items)
    columns = {
        "arm": [arm] * n,
        "query_id": [row["query_id"]] * n,
        "user_id": [row["user_id"]] * n,
        "rank": list(range(1, n + 1)),
        "item_id": [item.item_id for item in slate.items],
        "score": [item.score for item in slate.items],
    }
    to.slates.append(pl.DataFrame(columns, schema=SLATE_SCHEMA))
    to.latency_ms.append(latency_ms)
    to.fallback_reasons.update(slate.fallbacks)
    to.fallbacks += bool(slate.fallbacks)
