"""The way in of every stage: records are polled within bounds, decoded and validated; the rest becomes dead letters.

Shape legend: N events of a micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from feature_store.commit import EntityKind, OffsetStep, Update
from feature_store.state import Words
from recsys.core import Clock, EventBatch, VersionMismatch, logging, metrics
from recsys.core.murmur2 import partitions_of
from streaming.archive import Archive
from streaming.archive import Part as ArchivePart
from streaming.codec import FUTURE, INVALID, MISPLACED, Decoded, Rejected, decode_events, decode_impressions
from streaming.config import JobConfig
from streaming.dead_letter import put_aside
from streaming.dedup import Outcome
from streaming.log.base import Consumer, Log, Producer, RecordBatch
from streaming.topics import Topics

_log = logging.get_logger(__name__)
_SECOND_US = 1_000_000
_RECORDS_MIN = 1_024  # of a micro-batch, whatever a record makes a step write


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


class Outbox:
    """The producer of a job, made when there is something to send, and anew after a failure: an idempotent one may
    refuse everything from then on.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._broken = log, False
        self._producer: Producer | None = None

    def send(
        self,
        topic: str,
        key: bytes,
        value: bytes,
        headers: Mapping[str, bytes] | None = None,
        partition: int | None = None,
    ) -> None:
        """See Producer.send."""
        self._broken = True
        self._producer = self._producer or self._log.producer()
        self._producer.send(topic, key, value, headers, partition)
        self._broken = False

    def flush(self) -> None:
        """See Producer.flush."""
        if self._producer is not None:
            self._broken = True
            self._producer.flush()
            self._broken = False

    def renew(self) -> None:
        """Drop what a step that broke off has sent and not flushed."""
        if self._broken:
            self.close()

    def close(self) -> None:
        """Let go; what is not flushed belongs to no step that was committed."""
        if self._producer is not None:
            self._producer.abandon()
        self._producer, self._broken = None, False

    abandon = close


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What the stages of one job share."""

    log: Log
    config: JobConfig
    topics: Topics
    clock: Clock
    archive: Archive | None
    outbox: Outbox
    report: JobReport


@dataclass(frozen=True, slots=True)
class Part:
    """The valid events of one partition's records."""

    source: RecordBatch
    decoded: Decoded
    is_slate: bool


@dataclass(frozen=True, slots=True)
class Merged:
    """All parts as one batch of N events.

    part, offset, slate [N]: which part; offset of the record; which slate of the step, -1 for other events.
    """

    parts: Sequence[Part]
    batch: EventBatch
    part: Words
    offset: Words
    slate: Words
    stress: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Merged:
        """Parts in order."""
        batch = EventBatch.concat([p.decoded.batch for p in parts])
        part = np.repeat(np.arange(len(parts)), np.array([len(p.decoded.batch) for p in parts], np.int64))
        none = np.empty(0, np.int64)
        slates = [
            (i << 32) | p.decoded.row if p.is_slate else np.full(len(p.decoded.row), -1) for i, p in enumerate(parts)
        ]
        offset = np.concatenate([none, *(p.source.offset[p.decoded.row] for p in parts)])
        return cls(parts, batch, part, offset, np.concatenate([none, *slates]), batch.numpy("stress"))


class Intake:
    """Reads some topics of one stage, whose partitions come and go."""

    def __init__(self, means: Means, topics: Mapping[str, str | None], *, num_buckets: int | None = None) -> None:
        """topics: their prefixes in the archive, None = not archived. num_buckets: of a store that has buckets; events
        must then be in the partition of their id's bucket.
        """
        self._means, self._prefixes, self._num_buckets = means, topics, num_buckets
        self._consumers: dict[str, Consumer] = {}
        self._records_max = means.config.batch_records_max
        self.offsets: dict[str, dict[int, int]] = {topic: {} for topic in topics}
        self.furthest: dict[str, dict[int, int]] = {topic: {} for topic in topics}
        self._start: dict[str, dict[int, int]] = {topic: {} for topic in topics}

    @property
    def next_offsets(self) -> Mapping[str, Mapping[int, int]]:
        """Up to where everything that there is has been taken: where nothing has, that is where reading began."""
        return {t: {p: max(o, self._start[t][p]) for p, o in at.items()} for t, at in self.offsets.items()}

    def assign(self, offsets: Mapping[str, Mapping[int, int]], *, from_begin: str = "") -> None:
        """Read these partitions of each topic from now on, from these offsets.

        from_begin: a topic that is read from its beginning where the offset is 0, wherever that is.
        Raises: VersionMismatch for an offset below the log's start; Unavailable.
        """
        log = self._means.log
        self._take_archive(offsets)
        for topic in self._prefixes:
            begin = log.begin_offsets(topic)
            start = {p: o or (begin[p] if topic == from_begin else 0) for p, o in offsets[topic].items()}
            _check_begin(topic, start, begin)
            if topic in self._consumers:
                self._consumers[topic].assign(start)
            else:
                self._consumers[topic] = log.consumer(topic, start)
            self.offsets[topic] = dict(offsets[topic])  # as stored: what a step expects, wherever reading begins
            self._start[topic] = start
            self.furthest[topic] |= {p: max(o, self.furthest[topic].get(p, 0)) for p, o in start.items()}

    def poll(self) -> list[RecordBatch]:
        """A bounded micro-batch. Raises: Unavailable, VersionMismatch."""
        bounds = {"records_max": self._records_max, "bytes_max": self._means.config.batch_bytes_max}
        return [batch for consumer in self._consumers.values() for batch in consumer.poll(**bounds)]

    def wrote(self, polled: Sequence[RecordBatch], updates: Iterable[Update]) -> None:
        """Bound the next micro-batches by the state that a record makes a step write: it grows with what is known of
        each entity, and a store holds every page that it touches in memory until the step is durable.
        """
        c, num_records = self._means.config, sum(map(len, polled))
        per_record = sum(len(blob) for update in updates for blob in update.blobs) / max(num_records, 1)
        if num_records * per_record * 2 > c.step_bytes_max:  # a small step says little
            fit = int(c.step_bytes_max / per_record)
            self._records_max = max(min(fit, c.batch_records_max), min(_RECORDS_MIN, c.batch_records_max))

    def take(self, polled: Sequence[RecordBatch]) -> Merged:
        """Decode and validate; what fails is sent to dead letters, not flushed yet."""
        return Merged.of([self._decode(batch) for batch in polled])

    def steps(self, polled: Sequence[RecordBatch], side: EntityKind = "user") -> list[OffsetStep]:
        """How the offsets move by a micro-batch."""
        now = self.offsets
        for b in polled:
            self.furthest[b.topic][b.partition] = max(self.furthest[b.topic].get(b.partition, 0), b.next_offset)
        return [OffsetStep(b.topic, b.partition, now[b.topic][b.partition], b.next_offset, side) for b in polled]

    def committed(self, polled: Sequence[RecordBatch], merged: Merged | None = None) -> None:
        """The step of a micro-batch is durable: go on behind it, and count what was put aside."""
        for b in polled:
            self.offsets[b.topic][b.partition] = b.next_offset
        report = self._means.report
        for part in merged.parts if merged else ():
            for r in part.decoded.rejected:
                metrics.DEAD_LETTERS.labels(r.cause).inc()
                report.dead_letters[r.cause] += 1

    def archived(self, merged: Merged, outcome: npt.NDArray[np.int8]) -> None:
        """Write what was accepted, and what came too late, marked so; synced on return."""
        archive = self._means.archive
        if archive is None:
            return
        kept = ~merged.stress & ((outcome == Outcome.APPLIED) | (outcome == Outcome.LATE))
        schema = merged.batch.table.schema
        late = schema.get_field_index("late")
        table = merged.batch.table.set_column(late, schema.field(late), pa.array(outcome == Outcome.LATE))
        archive.write(
            [
                ArchivePart(
                    prefix,
                    part.source.partition,
                    self.offsets[part.source.topic][part.source.partition],
                    part.source.next_offset,
                    EventBatch(table).filter(mine),
                    merged.offset[mine],
                    int(part.source.append_us.max(initial=0)),
                )
                for i, part in enumerate(merged.parts)
                if (prefix := self._prefixes[part.source.topic]) is not None
                for mine in [kept & (merged.part == i)]
            ]
        )

    def _take_archive(self, offsets: Mapping[str, Mapping[int, int]]) -> None:
        """Archive these partitions from now on; those that are not ours any more are somebody else's to write."""
        archive = self._means.archive
        if archive is None:
            return
        prefixes = {topic: prefix for topic, prefix in self._prefixes.items() if prefix is not None}
        gone = [f"{prefix}{p}" for t, prefix in prefixes.items() for p in self.offsets[t].keys() - offsets[t].keys()]
        archive.leave(gone)
        archive.take(self._means.log.log_id(), {(prefix, t): offsets[t] for t, prefix in prefixes.items()})

    def close(self) -> None:
        """Let go of the consumers."""
        for consumer in self._consumers.values():
            consumer.close()

    def _decode(self, source: RecordBatch) -> Part:
        topics, config = self._means.topics, self._means.config
        is_slate = source.topic == topics.impressions
        decoded = (decode_impressions if is_slate else decode_events)(source.values, source.headers)
        now_us = self._means.clock.now_us()
        ahead_us = decoded.batch.numpy("event_time") - source.append_us[decoded.row]
        future = ahead_us > config.future_skew_max_s * _SECOND_US
        detail = f"an event time more than {config.future_skew_max_s} s after the record's; expected at most that"
        decoded = _without(decoded, future, FUTURE, detail)
        if source.topic == topics.catalog:
            acts = decoded.batch.table.column("user_id").is_valid().to_numpy()
            decoded = _without(decoded, acts, INVALID, f"an event of a user; expected on {topics.events}")
        if self._num_buckets is not None:
            decoded = self._in_place(decoded, source)
        for r in decoded.rejected:
            put_aside(self._means.outbox, topics.dead_letter, source, r.row, r, now_us)
            _log.warning(
                "dead_letter",
                cause=r.cause,
                topic=source.topic,
                partition=source.partition,
                offset=int(source.offset[r.row]),
                detail=r.detail,
            )
        return Part(source, decoded, is_slate)

    def _in_place(self, decoded: Decoded, source: RecordBatch) -> Decoded:
        """Put aside what another partition's owner keeps: two writers of one entity would lose what the other wrote."""
        column = "item_id" if source.topic == self._means.topics.catalog else "user_id"
        ids = decoded.batch.table.column(column).combine_chunks().dictionary_encode()
        bucket = np.append(partitions_of([i.encode() for i in ids.dictionary.to_pylist()], self._num_buckets or 1), -1)
        found = bucket[ids.indices.fill_null(len(ids.dictionary)).to_numpy()]
        detail = f"partition {source.partition}; expected murmur2({column}) modulo {self._num_buckets}"
        return _without(decoded, (found >= 0) & (found != source.partition), MISPLACED, detail)


def _without(decoded: Decoded, bad: npt.NDArray[np.bool_], cause: str, detail: str) -> Decoded:
    """Reject the records of some events, once each, with all their events."""
    if not bad.any():
        return decoded
    ids = decoded.batch.strings("event_id")
    first = {int(decoded.row[i]): int(i) for i in np.flatnonzero(bad)[::-1]}
    rejected = [Rejected(row, cause, detail, ids[i] or "") for row, i in sorted(first.items())]
    keep = ~np.isin(decoded.row, list(first))
    return replace(
        decoded, batch=decoded.batch.filter(keep), row=decoded.row[keep], rejected=[*decoded.rejected, *rejected]
    )


def _check_begin(topic: str, stored: Mapping[int, int], begin: Mapping[int, int]) -> None:
    for partition, offset in stored.items():
        if offset < begin[partition]:
            raise VersionMismatch(
                f"{topic}, partition {partition}",
                came=f"a stored offset of {offset}, below the log's start",
                expected=f"at least {begin[partition]}",
                fix="Records are gone: rebuild with double11 features materialize ARCHIVE --store URL.",
            )
