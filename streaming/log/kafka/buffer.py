"""Records that have arrived and wait to be handed out, fairly over partitions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from streaming.log.base import RecordBatch


@dataclass(slots=True)
class Records:
    """Records of one partition as columns, offsets ascending; append_us in microseconds UTC."""

    offset: list[int] = field(default_factory=list)
    append_us: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    headers: list[Mapping[str, bytes]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offset)

    def cut(self, first: int, records_max: int, bytes_max: int) -> Records:
        """From record `first` on, within both bounds, but at least one."""
        upto = min(first + records_max, len(self))
        sizes = list(accumulate(map(len, self.values[first:upto])))
        upto = min(upto, first + bisect_left(sizes, bytes_max) + 1)
        columns = (self.offset, self.append_us, self.keys, self.values, self.headers)
        return Records(*(c[first:upto] for c in columns))  # type: ignore[arg-type]


class FairBuffer:
    """Arrived records of some partitions of one topic, in order within a partition.

    A client library gives what one broker answered: partition after partition. Handing that out as it comes would let
    one long partition hold up the others by as much as is prefetched.
    """

    def __init__(self, topic: str, offsets: Mapping[int, int]) -> None:
        self._topic = topic
        self._next = dict(offsets)  # first offset not handed out; the order is whose turn it is
        self._end = dict(offsets)  # offset before which everything has arrived
        self._waiting: dict[int, Records] = {}
        self._taken: dict[int, int] = {}  # how many of those are handed out

    def __bool__(self) -> bool:
        """Whether records are waiting."""
        return bool(self._waiting)

    def fill(self, partition: int, records: Records) -> None:
        """More records of a partition, once what was there is handed out."""
        assert partition not in self._waiting, "filled when empty"
        if len(records):
            self._waiting[partition], self._taken[partition] = records, 0

    def reached(self, partition: int, end: int) -> None:
        """What was added is all there is before the offset `end`."""
        self._end[partition] = max(self._end[partition], end)

    def take(self, records_max: int, bytes_max: int) -> list[RecordBatch]:
        """The next records within both bounds, but at least one; partitions served go to the back of the line."""
        batches = []
        ready = [p for p in self._next if p in self._waiting]
        for left, partition in zip(range(len(ready), 0, -1), ready, strict=True):
            taken = self._take(partition, -(-records_max // left), -(-bytes_max // left))
            batches.append(self._batch(partition, taken))
            records_max -= len(taken)
            bytes_max -= sum(map(len, taken.values))
            if records_max <= 0 or bytes_max <= 0:
                break
        for partition, end in self._end.items():
            if partition not in self._waiting and end > self._next[partition]:
                batches.append(self._batch(partition, Records()))
        return batches

    def _take(self, partition: int, records_max: int, bytes_max: int) -> Records:
        waiting, first = self._waiting[partition], self._taken[partition]
        taken = waiting.cut(first, records_max, bytes_max)
        self._taken[partition] = first + len(taken)
        if self._taken[partition] == len(waiting):
            del self._waiting[partition]
        return taken

    def _batch(self, partition: int, taken: Records) -> RecordBatch:
        offset, append_us = np.array(taken.offset, np.int64), np.array(taken.append_us, np.int64)
        end = 0 if partition in self._waiting else self._end[partition]
        batch = RecordBatch(self._topic, partition, offset, append_us, taken.keys, taken.values, taken.headers, end)
        del self._next[partition]
        self._next[partition] = batch.next_offset
        return batch
