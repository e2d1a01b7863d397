"""The durable log, as every driver implements it: topics, partitions, offsets.

Shape legend: N records.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from recsys.core import BadInput
from recsys.core.murmur2 import partition_of

VALUE_BYTES_MAX = 1 << 20
SCHEMA_HEADER = "schema"  # version of the protobuf value
SCHEMA_VERSION = b"1"
STRESS_HEADER = "stress"
_PAUSE_S = 0.005  # between polls that found nothing: records are still on their way


def partition_for(topic: str, key: bytes, num_partitions: int, partition: int | None) -> int:
    """The partition asked for, else the key's. Raises: BadInput for one that is not there."""
    if partition is None:
        return partition_of(key, num_partitions)
    if not 0 <= partition < num_partitions:
        raise BadInput(
            f"record for {topic}",
            came=f"partition {partition}",
            expected=f"0 to {num_partitions - 1}",
            fix="Name one that exists, or none.",
        )
    return partition


def check_size(topic: str, value: bytes) -> None:
    """What every producer asks of a value. Raises: BadInput over VALUE_BYTES_MAX."""
    if len(value) > VALUE_BYTES_MAX:
        raise BadInput(
            f"record for {topic}",
            came=f"{len(value)} bytes",
            expected=f"at most {VALUE_BYTES_MAX} bytes",
            fix="Send smaller values.",
        )


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """N records of one partition, offsets ascending (they may have gaps); N = 0 when only `end` moved.

    offset [N]; append_us [N] = microseconds UTC at which the log took it, as far as it says so itself: a producer's
    stamp counts up to when it is read; keys, values and headers: N each.
    end: offset up to which there is no further record, e.g. after the marker of a transaction; 0 = none known.
    """

    topic: str
    partition: int
    offset: npt.NDArray[np.int64]
    append_us: npt.NDArray[np.int64]
    keys: Sequence[bytes]
    values: Sequence[bytes]
    headers: Sequence[Mapping[str, bytes]]
    end: int = 0

    def __len__(self) -> int:
        return len(self.values)

    @property
    def next_offset(self) -> int:
        """Where reading goes on after this batch."""
        return max(self.end, int(self.offset[-1]) + 1 if len(self.offset) else 0)


class Producer(Protocol):
    """Appends records. `send` buffers up to a bound and writes when it is reached; `flush` returns once durable."""

    def send(
        self,
        topic: str,
        key: bytes,
        value: bytes,
        headers: Mapping[str, bytes] | None = None,
        partition: int | None = None,
    ) -> None:
        """Hand over one record; its partition is murmur2(key) modulo the topic's partitions unless one is given.

        Raises: BadInput for a value over VALUE_BYTES_MAX or a partition that is not there; NotFound for an unknown
        topic; Unavailable, Overloaded from a write.
        """
        ...

    def flush(self) -> None:
        """Return when everything sent is durable.

        Raises: Unavailable, Overloaded; then nothing is known about what was sent since the last flush.
        """
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...

    def abandon(self) -> None:
        """Let go without waiting: what was sent since the last flush may still land, or never."""
        ...


class Consumer(Protocol):
    """Reads some partitions of one topic from given offsets on."""

    def assign(self, offsets: Mapping[int, int]) -> None:
        """Read these partitions, from these offsets on, instead of what was read until now. Raises: Unavailable."""
        ...

    def poll(self, *, records_max: int, bytes_max: int) -> list[RecordBatch]:
        """What has arrived, fairly over partitions, within both bounds (but at least one record if there is one).

        Never waits for records: a driver that fetches over the network returns [] until some are here.
        Raises: Unavailable; VersionMismatch for offsets that the log no longer has.
        """
        ...

    def close(self) -> None:
        """Let go."""
        ...


class Membership(Protocol):
    """Which partitions of a topic are this process's to read: one member of a consumer group, or everything.

    It only says so: reading starts from a store's offsets, never from the group's.
    """

    @property
    def is_group(self) -> bool:
        """Whether others may share the topic; else all partitions stay with this process."""
        ...

    def poll(self) -> frozenset[int]:
        """Partitions that are this process's now, without waiting. To be called at least every few seconds.

        Whoever calls has finished what concerns partitions that are gone from the answer: asking again lets go.
        Raises: Conflict when another process has taken this one's name (`group_instance_id`).
        """
        ...

    def commit(self, offsets: Mapping[str, Mapping[int, int]]) -> None:
        """Tell lag tools and KEDA how far this process is, by topic and partition. Failures are only counted."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class EverythingAssigned:
    """A Membership of one process alone."""

    is_group = False

    def __init__(self, num_partitions: int) -> None:
        self._assigned = frozenset(range(num_partitions))

    def poll(self) -> frozenset[int]:
        """All of them, always."""
        return self._assigned

    def commit(self, offsets: Mapping[str, Mapping[int, int]]) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        """Nothing to leave."""


class Log(Protocol):
    """One log: embedded in a folder, or a Kafka cluster."""

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """Create the topics that are missing.

        Raises: VersionMismatch when one exists with another number of partitions.
        """
        ...

    def log_id(self) -> str:
        """Tells this log from others, at whatever address: offsets are of one log. Raises: Unavailable, NotFound."""
        ...

    def num_partitions(self, topic: str) -> int:
        """Partitions of a topic. Raises: NotFound."""
        ...

    def begin_offsets(self, topic: str) -> Mapping[int, int]:
        """First offset still there, by partition."""
        ...

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        """Offset after the last stable record, by partition."""
        ...

    def producer(self) -> Producer:
        """A new producer."""
        ...

    def consumer(self, topic: str, offsets: Mapping[int, int]) -> Consumer:
        """A consumer of the given partitions from the given offsets on."""
        ...

    def membership(self, group: str, topic: str, *, alone: bool = False) -> Membership:
        """Join the consumer group that shares this topic; a log that one process reads gives it everything.

        alone: for a store that one process writes. It has everything and joins nothing, but still tells the group how
        far it is.
        """
        ...

    def close(self) -> None:
        """Let go of every connection and file."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def read_all(log: Log, topic: str, *, records_max: int = 10_000, bytes_max: int = 16 << 20) -> Iterator[RecordBatch]:
    """Everything in a topic, from its begin offsets to where its end was when this was called."""
    end = log.end_offsets(topic)
    consumer = log.consumer(topic, log.begin_offsets(topic))
    left = {p for p, o in end.items() if o > log.begin_offsets(topic)[p]}
    try:
        while left:
            batches = consumer.poll(records_max=records_max, bytes_max=bytes_max)
            if not batches:
                time.sleep(_PAUSE_S)
            for batch in batches:
                yield batch
                if batch.next_offset >= end[batch.partition]:
                    left.discard(batch.partition)
    finally:
        consumer.close()
