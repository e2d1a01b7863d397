"""Records that have arrived and wait to be handed out, fairly over partitions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from streaming.log.base import RecordBatch


class Record(NamedTuple):
    """One record; append_us in microseconds UTC."""

    offset: int
    append_us: int
    key: bytes
    value: bytes
    headers: Mapping[str, bytes]


class FairBuffer:
    """Arrived records of some partitions of one topic, in order within a partition.

    A client library gives what one broker answered: partition after partition. Handing that out as it comes would let
    one long partition hold up the others by as much as is prefetched.
    """

    def __init__(self, topic: str, offsets: Mapping[int, int]) -> None:
        self._topic = topic
        self._next = dict(offsets)  # first offset not handed out; the order is whose turn it is
        self._end = dict(offsets)  # offset before which everything has arrived
        self._records: dict[int, deque[Record]] = {p: deque() for p in offsets}

    def __bool__(self) -> bool:
        """Whether records are waiting."""
        return any(self._records.values())

    def add(self, partition: int, records: Iterable[Record]) -> None:
        """Records of a partition, offsets ascending."""
        self._records[partition].extend(records)

    def reached(self, partition: int, end: int) -> None:
        """What was added is all there is before the offset `end`."""
        self._end[partition] = max(self._end[partition], end)

    def take(self, records_max: int, bytes_max: int) -> list[RecordBatch]:
        """The next records within both bounds, but at least one; partitions served go to the back of the line."""
        batches = []
        ready = [p for p in self._next if self._records[p]]
        for left, partition in zip(range(len(ready), 0, -1), ready, strict=True):
            taken, taken_bytes = self._take(partition, -(-records_max // left), -(-bytes_max // left))
            batches.append(self._batch(partition, taken))
            records_max -= len(taken)
            bytes_max -= taken_bytes
            if records_max <= 0 or bytes_max <= 0:
                break
        for partition, waiting in self._records.items():
            if not waiting and self._end[partition] > self._next[partition]:
                batches.append(self._batch(partition, []))
        return batches

    def _take(self, partition: int, records_max: int, bytes_max: int) -> tuple[list[Record], int]:
        waiting, taken_bytes = self._records[partition], 0
        taken: list[Record] = []
        while waiting and len(taken) < records_max and (taken_bytes < bytes_max or not taken):
            record = waiting.popleft()
            taken.append(record)
            taken_bytes += len(record.value)
        return taken, taken_bytes

    def _batch(self, partition: int, taken: list[Record]) -> RecordBatch:
        offset, append_us, keys, values, headers = zip(*taken, strict=True) if taken else ((), (), (), (), ())
        end = 0 if self._records[partition] else self._end[partition]
        batch = RecordBatch(
            self._topic,
            partition,
            np.array(offset, np.int64),
            np.array(append_us, np.int64),
            list(keys),
            list(values),
            list(headers),
            end,
        )
        del self._next[partition]
        self._next[partition] = batch.next_offset
        return batch
