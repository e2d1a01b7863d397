"""What a step does, for each kind of store.

- SingleStage: a store of one transaction; users and items move together.
- UserStage, ItemStage: a store of buckets (ADR 8). The user stage owns the user side of the bucket of each partition of
  `events` it has, and sends what it accepts to `item-updates`; the item stage owns the item sides of its partitions.

A process has the partitions that its consumer group gives it; a step takes records of all of them and moves each
bucket by itself. What a refused step has left behind is harmless: records that will be sent again, and files that
the next start deletes.

Shape legend: N events of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns
from feature_store.commit import BucketStore, Commit, OffsetStep, OnlineStore, Position, Update
from feature_store.state import Words
from feature_store.update import folded, items_folded, users_folded
from recsys.core import metrics
from streaming.accept import accept
from streaming.codec import INVALID, Rejected
from streaming.dead_letter import put_aside
from streaming.dedup import Outcome
from streaming.intake import Intake, Means, Merged
from streaming.item_updates import ItemRows, Source, SourceRows, encode_updates
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION, RecordBatch

_HEADERS = {SCHEMA_HEADER: SCHEMA_VERSION}
_SECOND_US = 1_000_000


class Stage(Protocol):
    """One kind of step. `offsets`: where it is, by topic and partition."""

    @property
    def offsets(self) -> Mapping[str, Mapping[int, int]]:
        """Next offset of every partition it has."""
        ...

    @property
    def furthest(self) -> Mapping[str, Mapping[int, int]]:
        """Offsets that it has committed, or tried to."""
        ...

    def assign(self, partitions: Iterable[int]) -> None:
        """Start, or start again, from what the store has of these partitions. Raises: Unavailable, VersionMismatch."""
        ...

    def step(self) -> int:
        """One micro-batch; returns the number of records taken.

        Raises: Conflict, Unavailable, Overloaded; then `assign` before the next one.
        """
        ...

    def close(self) -> None:
        """Let go of the consumers."""
        ...


class _Reading:
    """What every stage says of its intake."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    @property
    def offsets(self) -> Mapping[str, Mapping[int, int]]:
        """Next offset of every partition it has."""
        return self._intake.next_offsets

    @property
    def furthest(self) -> Mapping[str, Mapping[int, int]]:
        """Offsets that it has committed, or tried to."""
        return self._intake.furthest

    def close(self) -> None:
        """Let go of the consumers."""
        self._intake.close()


class SingleStage(_Reading):
    """Users and items in one transaction."""

    def __init__(self, means: Means, store: OnlineStore) -> None:
        self._means, self._store = means, store
        topics = means.topics
        super().__init__(Intake(means, {topics.catalog: "c", topics.events: "", topics.impressions: "i"}))

    def assign(self, partitions: Iterable[int]) -> None:
        """See Stage; such a store has one writer, so these are all of `events`."""
        log, wanted = self._means.log, set(partitions)
        stored = {topic: self._store.offsets(topic) for topic in self.offsets}
        number = {topic: log.num_partitions(topic) if wanted else 0 for topic in stored}
        self._intake.assign({t: {p: at.get(p, 0) for p in range(number[t])} for t, at in stored.items()})

    def step(self) -> int:
        """See Stage."""
        polled = self._intake.poll()
        if not polled:
            return 0
        merged = self._intake.take(polled)
        self._means.outbox.flush()
        outcome, updates = np.zeros(len(merged.batch), np.int8), []
        for shadow, rows, events in _split(merged):
            accepted = accept(self._store.load, events, merged.slate[rows], _horizon_us(self._means), shadow=shadow)
            outcome[rows] = accepted.outcome
            kept = events.where(accepted.applied)
            updates += folded(self._store.load, kept, accepted.cleared, shadow=shadow) + accepted.delivery
        self._intake.archived(merged, outcome)
        steps, newest_us = self._intake.steps(polled), _newest_us(merged, outcome)
        self._store.commit(Commit(updates=updates, offsets=steps, max_event_time_us=newest_us))
        self._intake.wrote(polled, updates)
        self._intake.committed(polled, merged)
        return _counted(self._means, polled, outcome)


class UserStage(_Reading):
    """Folds users, tells the item stage what was accepted, then moves each bucket's user side."""

    def __init__(self, means: Means, store: BucketStore) -> None:
        self._means, self._store = means, store
        topics = means.topics
        super().__init__(Intake(means, {topics.events: "", topics.impressions: "i"}, num_buckets=store.num_buckets))
        self._namespace = ""

    def assign(self, partitions: Iterable[int]) -> None:
        """See Stage; partitions of `events`, whose impressions come with them."""
        self._namespace = self._store.namespace()
        self._intake.assign(_start(self.offsets, self._store.claim("user", partitions)))

    def step(self) -> int:
        """See Stage."""
        polled = self._intake.poll()
        if not polled:
            return 0
        merged = self._intake.take(polled)
        outcome, applied = np.zeros(len(merged.batch), np.int8), np.zeros(len(merged.batch), np.bool_)
        updates: list[Update] = []
        accepted_events = []
        for shadow, rows, events in _split(merged):
            accepted = accept(self._store.load, events, merged.slate[rows], _horizon_us(self._means), shadow=shadow)
            outcome[rows], applied[rows] = accepted.outcome, accepted.applied
            kept = events.where(accepted.applied)
            updates.append(users_folded(self._store.load, kept, accepted.cleared, shadow=shadow))
            updates += accepted.delivery
            accepted_events.append(kept)
        # What is sent cannot be taken back: it has to come from one state of each bucket, that of its offsets.
        self._store.verify("user", {b.partition for b in polled})
        at = np.flatnonzero(applied)
        one = len(accepted_events) == 1
        self._send(merged, at, accepted_events[0] if one else EventColumns.of(merged.batch.take(at)))
        self._intake.archived(merged, outcome)
        steps, newest_us = self._intake.steps(polled), _newest_us(merged, outcome)
        self._store.commit(Commit(updates=updates, offsets=steps, max_event_time_us=newest_us))
        self._intake.wrote(polled, updates)
        self._intake.committed(polled, merged)
        return _counted(self._means, polled, outcome)

    def _send(self, merged: Merged, at: Words, events: EventColumns) -> None:
        """Item updates, each round durable before the next (see `item_updates`), and dead letters with the first.

        at: rows of `merged` that were accepted; events: the same as columns.
        """
        outbox, topic = self._means.outbox, self._means.topics.item_updates
        rows = SourceRows(
            sources=[(p.source.topic, p.source.partition) for p in merged.parts],
            source=merged.part[at],
            offset=merged.offset[at],
            stress=merged.stress[at],
        )
        for records in encode_updates(self._namespace, events, rows, self._store.num_buckets):
            for partition, value in records:
                outbox.send(topic, b"", value, _HEADERS, partition)
            outbox.flush()
        outbox.flush()


class ItemStage(_Reading):
    """Folds items from what user stages have sent and from the catalogue, then moves each bucket's item side."""

    def __init__(self, means: Means, store: BucketStore) -> None:
        self._means, self._store = means, store
        topics = means.topics
        super().__init__(Intake(means, {topics.item_updates: None, topics.catalog: "c"}, num_buckets=store.num_buckets))
        self._marks: dict[int, dict[Source, int]] = {}
        self._namespace = ""

    def assign(self, partitions: Iterable[int]) -> None:
        """See Stage; partitions of `item-updates`, whose catalogue changes come with them.

        A namespace that has read none yet reads them from the first that is there: its own are among them.
        """
        self._namespace = self._store.namespace()
        positions = self._store.claim("item", partitions)
        self._marks = {bucket: dict(at.marks) for bucket, at in positions.items()}
        self._intake.assign(_start(self.offsets, positions), from_begin=self._means.topics.item_updates)

    def step(self) -> int:
        """See Stage."""
        polled = self._intake.poll()
        if not polled:
            return 0
        sent = [b for b in polled if b.topic == self._means.topics.item_updates]
        merged = self._intake.take([b for b in polled if b.topic == self._means.topics.catalog])
        rows, marks = ItemRows(), {b.partition: dict(self._marks[b.partition]) for b in sent}
        for batch in sent:
            self._gather(batch, rows, marks[batch.partition])
        if len(merged.batch):
            rows.add_events(EventColumns.of(merged.batch), merged.stress)
        self._means.outbox.flush()
        events, stress = rows.events()
        updates = [
            items_folded(self._store.load, events.where(stress == shadow), shadow=shadow)
            for shadow in (False, True)
            if (stress == shadow).any()
        ]
        outcome = np.zeros(len(merged.batch), np.int8)
        self._intake.archived(merged, outcome)
        self._store.verify("item", {b.partition for b in polled})
        steps = self._intake.steps(polled, "item") + self._mark_steps(marks)
        self._store.commit(Commit(updates=updates, offsets=steps, max_event_time_us=_newest_us(merged, outcome)))
        self._intake.wrote(polled, updates)
        self._intake.committed(polled, merged)
        self._marks |= marks
        return sum(map(len, sent)) + _counted(self._means, [p.source for p in merged.parts], outcome)

    def _gather(self, batch: RecordBatch, rows: ItemRows, marks: dict[Source, int]) -> None:
        for i, value in enumerate(batch.values):
            try:
                rows.add_record(value, self._namespace, marks)
            except ValueError as error:  # nobody but us writes here: a broken one is looked at by hand
                rejected, at_us = Rejected(i, INVALID, str(error)), self._means.clock.now_us()
                put_aside(self._means.outbox, self._means.topics.dead_letter, batch, i, rejected, at_us)
                metrics.DEAD_LETTERS.labels(INVALID).inc()

    def _mark_steps(self, marks: Mapping[int, Mapping[Source, int]]) -> list[OffsetStep]:
        return [
            OffsetStep(topic, p, before, after, "item", bucket)
            for bucket, moved in marks.items()
            for (topic, p), after in moved.items()
            if after != (before := self._marks[bucket].get((topic, p), 0))
        ]


def _start(topics: Iterable[str], positions: Mapping[int, Position]) -> dict[str, dict[int, int]]:
    """Offsets of each topic from the buckets that read them."""
    return {topic: {p: at.offsets.get((topic, p), 0) for p, at in positions.items()} for topic in topics}


def _split(merged: Merged) -> Iterable[tuple[bool, Words, EventColumns]]:
    """Ordinary events, then stress traffic, where there are any: whether, rows of `merged`, columns."""
    for shadow in (False, True):
        rows = np.flatnonzero(merged.stress == shadow)
        if len(rows):
            batch = merged.batch if len(rows) == len(merged.batch) else merged.batch.take(rows)
            yield shadow, rows, EventColumns.of(batch)


def _horizon_us(means: Means) -> int:
    return means.config.dedup_horizon_s * _SECOND_US


def _newest_us(merged: Merged, outcome: npt.NDArray[np.int8]) -> int:
    """The largest event time applied, stress traffic left out; 0 without any."""
    applied = (outcome == Outcome.APPLIED) & ~merged.stress
    return int(merged.batch.numpy("event_time")[applied].max(initial=0))


def _counted(means: Means, polled: Iterable[RecordBatch], outcome: npt.NDArray[np.int8]) -> int:
    """Count a committed step; returns its records."""
    report, num_records = means.report, sum(map(len, polled))
    for kind, number in zip(Outcome, np.bincount(outcome, minlength=len(Outcome)).tolist(), strict=True):
        if number:
            metrics.EVENTS.labels(kind.name.lower()).inc(number)
            report.events[kind.name.lower()] += number
    report.steps += 1
    report.records += num_records
    return num_records
