"""The streaming job: poll, decode, validate, dedupe, fold, and move the offsets in the same atomic step.

The store's offsets are the only start position. A step is: poll a bounded micro-batch of every topic; put aside what
cannot be read (dead letters are durable before the step); classify repeats and late events; archive; fold; commit.
SIGKILL at any point loses nothing and doubles nothing: either the commit happened or the step runs again.

Shape legend: N events of a micro-batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Event as StopEvent

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from feature_store.columns import EventColumns
from feature_store.commit import DELIVERY, Commit, EntityKind, EntryKind, OffsetStep, OnlineStore, Unfinished, Update
from feature_store.forget import clear, screen
from feature_store.state import State, Words, decode, encode
from feature_store.update import folded
from recsys.core import Clock, EventBatch, EventKind, VersionMismatch, WallClock, logging, metrics
from streaming.archive import Archive, Part
from streaming.codec import FUTURE, Decoded, Rejected, decode_events, decode_impressions
from streaming.config import JobConfig
from streaming.dead_letter import put_aside
from streaming.dedup import Outcome, classify
from streaming.log.base import Consumer, Log, RecordBatch
from streaming.topics import Topics

_log = logging.get_logger(__name__)
_SECOND_US = 1_000_000
_IDLE_WORK_S = 60.0


@dataclass(kw_only=True, slots=True)
class JobReport:
    """What a run did: events by outcome, dead letters by cause, steps committed, seconds."""

    events: Counter[str] = field(default_factory=Counter)
    dead_letters: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    records: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, object]:
        """For --json."""
        rate = round(self.records / self.seconds) if self.seconds else 0
        return {
            "events": dict(self.events),
            "dead_letters": dict(self.dead_letters),
            "steps": self.steps,
            "records": self.records,
            "seconds": round(self.seconds, 3),
            "records_per_s": rate,
        }


@dataclass(frozen=True, slots=True)
class _Part:
    """The valid events of one partition's records."""

    source: RecordBatch
    decoded: Decoded
    is_slate: bool


@dataclass(frozen=True, slots=True)
class _Merged:
    """All parts as one batch of N events.

    part, offset, slate [N]: which part; offset of the record; which slate of the step, -1 for other events.
    """

    batch: EventBatch
    part: Words
    offset: Words
    slate: Words
    stress: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, parts: Sequence[_Part]) -> _Merged:
        """Parts in order."""
        batch = EventBatch.concat([p.decoded.batch for p in parts])
        part = np.repeat(np.arange(len(parts)), [len(p.decoded.batch) for p in parts])
        slates = [
            (i << 32) | p.decoded.row if p.is_slate else np.full(len(p.decoded.row), -1) for i, p in enumerate(parts)
        ]
        offset = np.concatenate([p.source.offset[p.decoded.row] for p in parts])
        return cls(batch, part, offset, np.concatenate(slates).astype(np.int64), batch.numpy("stress"))


class Job:
    """One writer: reads all partitions of events, catalog and impressions into one store."""

    def __init__(
        self,
        log: Log,
        store: OnlineStore,
        config: JobConfig | None = None,
        *,
        topics: Topics | None = None,
        clock: Clock | None = None,
        archive: Archive | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> None:
        """on_step is told the number of records after each commit."""
        self._log, self._store = log, store
        self._config, self._topics = config or JobConfig(), topics or Topics()
        self._clock, self._archive, self._on_step = clock or WallClock(), archive, on_step
        self._producer = log.producer()
        self._offsets: dict[str, dict[int, int]] = {}
        self._consumers: dict[str, Consumer] = {}
        self.report = JobReport()
        self._idle_next_s = 0.0
        self._unfinished = store.unfinished()
        self._prefixes = {self._topics.catalog: "c", self._topics.events: "", self._topics.impressions: "i"}
        store.bind(log.log_id())
        for topic in self._prefixes:
            stored = store.offsets(topic)
            self._offsets[topic] = {p: stored.get(p, 0) for p in range(log.num_partitions(topic))}
            _check_begin(topic, self._offsets[topic], log.begin_offsets(topic))
            self._consumers[topic] = log.consumer(topic, self._offsets[topic])
        if archive is not None:
            # What is below an offset of any bucket was archived before that bucket was written.
            taken = {
                (prefix, t): {p: max(o, self._end(t, p)) for p, o in self._offsets[t].items()}
                for t, prefix in self._prefixes.items()
            }
            archive.take(log.log_id(), taken)

    def run(self, *, until_caught_up: bool = False, stop: StopEvent | None = None) -> JobReport:
        """Step until stopped, or until what was in the log at the start is applied. The step under way is finished.

        Raises: Conflict when another writer moved the offsets; Unavailable, Overloaded from log and store.
        """
        stop = stop or StopEvent()
        target = {t: self._log.end_offsets(t) for t in self._consumers} if until_caught_up else None
        started = time.perf_counter()
        while not stop.is_set():
            if target is not None and self._reached(target):
                break
            if not self.step():
                self._when_idle()
                stop.wait(self._config.idle_ms / 1e3)
        self.report.seconds += time.perf_counter() - started
        return self.report

    def lag(self) -> dict[str, int]:
        """Records not applied yet, by topic; also set as a metric per partition."""
        found = {}
        for topic, offsets in self._offsets.items():
            behind = {p: end - offsets[p] for p, end in self._log.end_offsets(topic).items()}
            for partition, records in behind.items():
                metrics.LAG_RECORDS.labels(topic, str(partition)).set(records)
            found[topic] = sum(behind.values())
        return found

    def close(self) -> None:
        """Let go of producer and consumers; log and store stay open."""
        for consumer in self._consumers.values():
            consumer.close()
        self._producer.close()

    def step(self) -> int:
        """One micro-batch; returns the number of records taken."""
        bounds = {"records_max": self._config.batch_records_max, "bytes_max": self._config.batch_bytes_max}
        polled = [(t, batch) for t, consumer in self._consumers.items() for batch in consumer.poll(**bounds)]
        if not polled:
            return 0
        parts = [self._decode(topic, batch) for topic, batch in polled]
        if any(p.decoded.rejected for p in parts):
            self._producer.flush()
        merged = _Merged.of(parts)
        outcome = np.zeros(len(merged.batch), np.int8)
        updates: list[Update] = []
        seen: list[Update] = []
        newest_us = 0
        for shadow in (False, True):
            rows = np.flatnonzero(merged.stress == shadow)
            if not len(rows):
                continue
            events = EventColumns.of(merged.batch if len(rows) == len(merged.batch) else merged.batch.take(rows))
            of_items = np.ones(len(rows), np.bool_)
            if self._unfinished is not None:
                users_have, items_have = _applied(self._unfinished, events, merged, parts, rows, shadow)
                outcome[rows[users_have]] = Outcome.DUPLICATE
                rows, of_items, events = rows[~users_have], ~items_have[~users_have], events.where(~users_have)
            outcome[rows], new_updates, new_seen = self._fold(events, merged.slate[rows], of_items, shadow)
            updates += new_updates
            seen += new_seen
            if not shadow:
                newest_us = int(events.time_us[outcome[rows] == Outcome.APPLIED].max(initial=0))
        if self._archive is not None:
            self._write_archive(self._archive, parts, merged, outcome)
        steps = [OffsetStep(t, b.partition, self._offsets[t][b.partition], b.next_offset) for t, b in polled]
        self._store.commit(Commit(updates=updates, seen_event_ids=seen, offsets=steps, max_event_time_us=newest_us))
        return self._committed(steps, sum(len(b) for _, b in polled), outcome)

    def _committed(self, steps: Sequence[OffsetStep], num_records: int, outcome: npt.NDArray[np.int8]) -> int:
        for o in steps:
            self._offsets[o.topic][o.partition] = o.next
        sources = ((t, p, offset) for t, offsets in self._offsets.items() for p, offset in offsets.items())
        if self._unfinished is not None and all(offset >= self._end(t, p) for t, p, offset in sources):
            self._unfinished = None
        for kind, number in zip(Outcome, np.bincount(outcome, minlength=len(Outcome)).tolist(), strict=True):
            if number:
                metrics.EVENTS.labels(kind.name.lower()).inc(number)
                self.report.events[kind.name.lower()] += number
        self.report.steps += 1
        self.report.records += num_records
        if self._on_step is not None:
            self._on_step(num_records)
        return num_records

    def _end(self, topic: str, partition: int) -> int:
        """From this offset on no bucket of the store is ahead."""
        return 0 if self._unfinished is None else self._unfinished.end((topic, partition))

    def _reached(self, target: Mapping[str, Mapping[int, int]]) -> bool:
        return all(self._offsets[t][p] >= end for t, ends in target.items() for p, end in ends.items())

    def _write_archive(
        self, archive: Archive, parts: Sequence[_Part], merged: _Merged, outcome: npt.NDArray[np.int8]
    ) -> None:
        kept = ~merged.stress & ((outcome == Outcome.APPLIED) | (outcome == Outcome.LATE))
        late = merged.batch.table.schema.get_field_index("late")
        table = merged.batch.table.set_column(
            late, merged.batch.table.schema.field(late), pa.array(outcome == Outcome.LATE)
        )
        archive.write(
            [
                Part(
                    self._prefixes[part.source.topic],
                    part.source.partition,
                    self._offsets[part.source.topic][part.source.partition],
                    part.source.next_offset,
                    EventBatch(table).filter(kept & (merged.part == i)),
                    merged.offset[kept & (merged.part == i)],
                    int(part.source.append_us.max(initial=0)),
                )
                for i, part in enumerate(parts)
            ]
        )

    def _when_idle(self) -> None:
        """Caught up: publish the archive's catalogue, so that it can be read while it grows, and measure the lag."""
        if self._archive is not None:
            self._archive.idle()
        now_s = time.monotonic()
        if now_s < self._idle_next_s:
            return
        self._idle_next_s = now_s + _IDLE_WORK_S
        self.lag()
        if self._archive is not None:
            self._archive.finish()

    def _decode(self, topic: str, source: RecordBatch) -> _Part:
        """Decode and validate; what fails goes to dead letters (not flushed yet)."""
        is_slate = topic == self._topics.impressions
        decoded = (decode_impressions if is_slate else decode_events)(source.values, source.headers)
        ahead_us = decoded.batch.numpy("event_time") - source.append_us[decoded.row]
        future = ahead_us > self._config.future_skew_max_s * _SECOND_US
        rejected = list(decoded.rejected)
        if future.any():
            rejected += self._future(decoded, np.flatnonzero(future), ahead_us)
            decoded = replace(decoded, batch=decoded.batch.filter(~future), row=decoded.row[~future])
        now_us = self._clock.now_us()
        for r in rejected:
            put_aside(self._producer, self._topics.dead_letter, source, r.row, r, now_us)
            metrics.DEAD_LETTERS.labels(r.cause).inc()
            self.report.dead_letters[r.cause] += 1
            _log.warning(
                "dead_letter",
                cause=r.cause,
                topic=topic,
                partition=source.partition,
                offset=int(source.offset[r.row]),
                detail=r.detail,
            )
        return _Part(source, replace(decoded, rejected=rejected), is_slate)

    @staticmethod
    def _future(decoded: Decoded, at: Words, ahead_us: Words) -> list[Rejected]:
        """One rejection per record, however many events it holds."""
        ids = decoded.batch.strings("event_id")
        first = {int(decoded.row[i]): int(i) for i in at[::-1]}
        detail = "event time {} s after the record's; expected at most the allowed skew"
        return [
            Rejected(row, FUTURE, detail.format(int(ahead_us[i]) // _SECOND_US), ids[i] or "")
            for row, i in sorted(first.items())
        ]

    def _fold(
        self, events: EventColumns, slate: Words, of_items: npt.NDArray[np.bool_], shadow: bool
    ) -> tuple[npt.NDArray[np.int8], list[Update], list[Update]]:
        """Outcomes [N] and updates of one namespace. slate [N]: number of the slate of each event, -1 for others.

        of_items [N]: events that their items do not have yet.
        """
        load = self._store.load
        ids = events.user_ids
        seen = decode(DELIVERY, load("seen", ids, shadow=shadow))
        screened = screen(events, seen["forgotten"])
        seen = State({**clear(seen, screened.cleared).rows, "forgotten": screened.forgotten})
        horizon_us = self._config.dedup_horizon_s * _SECOND_US
        outcome = np.zeros(len(events), np.int8)
        outcome[~screened.keep & (events.kind != EventKind.FORGET)] = Outcome.FORGOTTEN
        acted = np.flatnonzero(screened.keep & (events.user_code >= 0) & (slate < 0))
        user, time_us, event_key = events.user_code[acted], events.time_us[acted], events.event_key[acted]
        outcome[acted], seen_ids = classify(user, time_us, event_key, seen["seen"], horizon_us)
        updates = [_delivered("seen", ids, State({**seen.rows, "seen": seen_ids}), shadow)]
        shown = np.flatnonzero(screened.keep & (slate >= 0))
        if len(shown):
            # A slate is one unit: its events live or fall together, under the key of its first event.
            _, first, unit = np.unique(slate[shown], return_index=True, return_inverse=True)
            of_slate = shown[first]
            known = clear(decode(DELIVERY, load("shown", ids, shadow=shadow)), screened.cleared)
            user, time_us, event_key = (c[of_slate] for c in (events.user_code, events.time_us, events.event_key))
            found, kept = classify(user, time_us, event_key, known["seen"], horizon_us)
            outcome[shown] = found[unit]
            updates.append(_delivered("shown", ids, State({**known.rows, "seen": kept}), shadow))
        applied = (outcome == Outcome.APPLIED) & screened.keep
        new = folded(load, events.where(applied), screened.cleared, of_items=of_items[applied], shadow=shadow)
        return outcome, new, updates


def _applied(
    unfinished: Unfinished,
    events: EventColumns,
    merged: _Merged,
    parts: Sequence[_Part],
    rows: npt.NDArray[np.int64],
    shadow: bool,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which events (rows of `merged`) the user's bucket, and the item's, has already [N].

    No user is ahead of an item, so what a user has is done with. Events without a user go by their item.
    """
    part, offset = merged.part[rows], merged.offset[rows]
    sides: list[tuple[EntityKind, list[str], Words]] = [
        ("user", events.user_ids, events.user_code),
        ("item", events.item_ids, events.item_code),
    ]
    have = np.zeros((2, len(events)), np.bool_)
    for row, (side, ids, code) in enumerate(sides):
        for i in np.unique(part).tolist():
            source, at = parts[i].source, np.flatnonzero(part == i)
            done = unfinished.next_offsets(side, ids, (source.topic, source.partition), shadow=shadow)
            have[row, at] = offset[at] < np.append(done, 0)[code[at]]
    return np.where(events.user_code >= 0, have[0], have[1]), have[1]


def _delivered(kind: EntryKind, ids: Sequence[str], state: State, shadow: bool) -> Update:
    return Update(kind, ids, encode(state), shadow)


def _check_begin(topic: str, stored: Mapping[int, int], begin: Mapping[int, int]) -> None:
    for partition, first in begin.items():
        if stored[partition] < first:
            raise VersionMismatch(
                f"{topic}, partition {partition}",
                came=f"a stored offset of {stored[partition]}, below the log's start",
                expected=f"at least {first}",
                fix="Records are gone: rebuild with double11 features materialize ARCHIVE --store URL.",
            )
