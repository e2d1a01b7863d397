"""Produce a dataset's events to the log, as fast as it goes or re-enacted at a multiple of their own speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from threading import Event as StopEvent

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import BadInput, Clock, EventBatch, EventKind, WallClock
from recsys.core.murmur2 import partition_of
from streaming.codec import encode_events, owner_of
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION, Log
from streaming.topics import Topics

_SLICE_S = 0.05
_HEADERS = {SCHEMA_HEADER: SCHEMA_VERSION}
_FUTURE_US = 300 * 1_000_000
_OF_USERS = (EventKind.ACTION, EventKind.FORGET)


@dataclass(frozen=True, slots=True)
class ProduceReport:
    """What was made durable, and how long it took."""

    events: int
    seconds: float

    def as_json(self) -> dict[str, float]:
        """For --json."""
        rate = round(self.events / self.seconds) if self.seconds else 0
        return {"events": self.events, "seconds": round(self.seconds, 3), "events_per_s": rate}


def check_not_future(last_event_us: int, clock: Clock) -> None:
    """Refuse a dataset whose events have not happened yet: the job would put them aside one by one.

    Raises: BadInput.
    """
    if last_event_us > clock.now_us() + _FUTURE_US:
        raise BadInput(
            "dataset",
            came=f"events up to {np.datetime64(last_event_us, 'us')}Z, in the future",
            expected="events that have happened",
            fix="Move them: --shift-to ISO gives the last event or catalogue change that time and all others the same "
            "shift; --until ISO leaves out what comes later.",
        )


def check_since_1970(first_us: int, last_us: int, shift_us: int) -> None:
    """Refuse a shift that moves events to where no record may be: first_us is the first one's time before it, last_us
    that of the last event or catalogue change. Raises: BadInput.
    """
    if shift_us and first_us + shift_us <= 0:
        before, after, last = (f"{np.datetime64(us, 'us')}Z" for us in (first_us, first_us + shift_us, last_us))
        raise BadInput(
            "--shift-to",
            came=f"a time that moves events of {before} to {after}, as something of the dataset is of {last}",
            expected="events after 1970-01-01",
            fix="--until ISO leaves out what lies far behind the other events, of the catalogue too; --from ISO what "
            "lies far before them. Or give a later time.",
        )


def produce(
    batches: Iterable[EventBatch],
    log: Log,
    *,
    topics: Topics | None = None,
    clock: Clock | None = None,
    speed: float | None = None,
    shift_us: int = 0,
    stop: StopEvent | None = None,
    on_sent: Callable[[int], object] | None = None,
) -> ProduceReport:
    """Send batches in event-time order; everything is durable on return.

    speed: 1.0 = as fast as the events happened, None = as fast as it goes. shift_us: see `shifted`.
    Actions and forgets go to `events` by user, catalogue changes to `catalog` by item.
    Raises: BadInput for an event in the future, what comes before its batch has been sent; or for a price or stock of
    null, what comes before it has been sent.
    """
    topics, clock, stop = topics or Topics(), clock or WallClock(), stop or StopEvent()
    started, sent, first_us = time.perf_counter(), 0, None
    num_partitions = log.num_partitions(topics.catalog)
    with closing(log.producer()) as producer:
        for batch in batches:
            batch = shifted(batch, shift_us)
            if not len(batch):
                continue
            times = batch.numpy("event_time")
            check_not_future(int(times.max()), clock)
            first_us = int(times[0]) if first_us is None else first_us
            done = 0
            while done < len(batch) and not stop.is_set():
                upto = len(batch)
                if speed is not None:
                    due_us = first_us + int((time.perf_counter() - started) * 1e6 * speed)
                    upto = int(np.searchsorted(times, due_us, side="right"))
                if upto > done:
                    part = batch.slice(done, upto - done)
                    for kind, key, value in encode_events(part):
                        if kind in _OF_USERS:
                            producer.send(topics.events, key, value, _HEADERS)
                        else:
                            partition = partition_of(owner_of(key), num_partitions)
                            producer.send(topics.catalog, key, value, _HEADERS, partition)
                    done = upto
                    if on_sent is not None:
                        on_sent(len(part))
                if speed is not None:
                    producer.flush()
                    stop.wait(_SLICE_S)
            sent += done
            if stop.is_set():
                break
    return ProduceReport(sent, time.perf_counter() - started)


def shifted(batch: EventBatch, shift_us: int) -> EventBatch:
    """All times moved by the same amount; what of the catalogue would be before 1970 stays in its first microsecond, as
    a dataset dates what was.
    """
    table = batch.table
    is_of_user = pc.is_in(table.column("kind"), pa.array([int(k) for k in _OF_USERS], pa.int8()))
    for name in ("event_time", "known_at") if shift_us else ():
        at, moved = table.schema.get_field_index(name), pc.add(table.column(name), shift_us)
        moved = pc.if_else(is_of_user, moved, pc.max_element_wise(moved, 1, skip_nulls=False))
        table = table.set_column(at, table.schema.field(at), moved)
    return EventBatch(table)
