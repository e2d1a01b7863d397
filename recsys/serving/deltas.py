"""Follow the deltas topic: what online training publishes goes into this process, models whole or not at all.

Whoever follows starts from its run and reads the topic from its first record; records of other runs are not its
business, nor are bytes that are no delta. A worker's models change where scoring happens, so no call sees half a delta.
After a gap, or a delta that cannot be applied, they stay at the last whole one, and the worker says so until it is
restarted with a newer run. Rows of indexes stand for themselves: a gateway takes what it can read, in whatever part it
comes.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from double11.v1 import admin_pb2, delta_pb2
from google.protobuf.message import DecodeError

from recsys.candidates.rows import FreshRows
from recsys.core import BadInput, Clock, CorruptData, Deadline, Double11Error, Overloaded, VersionMismatch, logging
from recsys.core.index_rows import IndexRows
from recsys.core.metrics import DELTA_AGE_S, DELTA_SEQUENCE, DELTAS, LAG_RECORDS
from streaming.log import Log, RecordBatch

if TYPE_CHECKING:
    from recsys.serving.scoring_service import ScoringService

_log = logging.get_logger(__name__)
_RECORDS_MAX, _BYTES_MAX = 256, 8 << 20
_POLL_S, _RETRY_S = 0.1, 2.0


@dataclass(slots=True)
class Following:
    """Where a follower is. unread: why the log cannot be read now. stopped: why it follows no more. Else empty."""

    run_id: str
    sequence: int = 0
    samples_until_us: int = 0
    offset: int = 0
    lag_records: int = 0
    unread: str = ""
    stopped: str = ""

    @property
    def degraded(self) -> bool:
        """Whether what is served gets old."""
        return bool(self.unread or self.stopped)

    def line(self) -> str:
        """For people."""
        line = f"run {self.run_id}, delta {self.sequence}"
        line += f", {self.lag_records} records behind" if self.lag_records else ""
        line += f", not read: {self.unread}" if self.unread else ""
        return line + (f", stopped: {self.stopped}" if self.stopped else "")


class Follower(ABC):
    """Reads deltas of one run. `run` until cancelled."""

    def __init__(
        self, log: Log, topic: str, run_id: str, clock: Clock, tell: Callable[[Following], None] = lambda _: None
    ) -> None:
        """tell: called with where this follower is, when its line has changed."""
        self._log, self._topic, self._clock, self._tell = log, topic, clock, tell
        self.state = Following(run_id)
        self._told = ""
        self._others = set[str]()

    async def run(self) -> None:
        """Follow for good; trouble with the log is tried again, a gap is the end."""
        while not self.state.stopped:
            try:
                await self._follow()
            except Double11Error as error:
                _log.warning("deltas_not_read", error=str(error), again_in_s=_RETRY_S)
                DELTAS.labels(outcome="log-unavailable").inc()
                self.state.unread = str(error)
                self._say()
                await asyncio.sleep(_RETRY_S)

    async def _follow(self) -> None:
        offset = self.state.offset or (await asyncio.to_thread(self._log.begin_offsets, self._topic))[0]
        consumer = await asyncio.to_thread(self._log.consumer, self._topic, {0: offset})
        try:
            while not self.state.stopped:
                batches = await asyncio.to_thread(consumer.poll, records_max=_RECORDS_MAX, bytes_max=_BYTES_MAX)
                for batch in batches:
                    await self._take(batch)
                await self._say_lag()
                if not batches:
                    await self._idle()
                    await asyncio.sleep(_POLL_S)
        finally:
            await asyncio.to_thread(consumer.close)

    async def _take(self, batch: RecordBatch) -> None:
        for offset, value in zip(batch.offset.tolist(), batch.values, strict=True):
            try:
                part = delta_pb2.Delta.FromString(value)
            except DecodeError as error:  # names no run; had it been of this one, the next delta says what is missing
                DELTAS.labels(outcome="unreadable").inc()
                _log.error("delta_unreadable", offset=offset, error=str(error))
                continue
            try:
                if self._is_ours(part):
                    await self._offered(value, part)
            except (VersionMismatch, CorruptData, BadInput) as error:
                DELTAS.labels(outcome="refused").inc()
                _log.error("delta_refused", offset=offset, sequence=self.state.sequence, error=str(error))
                self._refused(error)
                if self.state.stopped:
                    return
        self.state.offset = batch.next_offset

    @abstractmethod
    async def _offered(self, value: bytes, part: delta_pb2.Delta) -> None:
        """Take a record; part: what it says. Raises: VersionMismatch, CorruptData, BadInput for one that is no use."""

    @abstractmethod
    def _refused(self, error: Double11Error) -> None:
        """A record was not taken."""

    @abstractmethod
    async def _idle(self) -> None:
        """Nothing came."""

    def _applied(self, sequence: int, samples_until_us: int) -> None:
        self.state.sequence, self.state.samples_until_us = sequence, samples_until_us
        DELTAS.labels(outcome="applied").inc()
        DELTA_SEQUENCE.labels(run_id=self.state.run_id).set(sequence)
        _log.info("delta_applied", run=self.state.run_id, sequence=sequence)

    def _is_ours(self, part: delta_pb2.Delta) -> bool:
        if part.run_id == self.state.run_id:
            return True
        DELTAS.labels(outcome="other-run").inc()
        if part.run_id not in self._others:
            self._others.add(part.run_id)
            _log.warning("deltas_of_another_run_left_out", came=part.run_id, serving=self.state.run_id)
        return False

    async def _say_lag(self) -> None:
        end = (await asyncio.to_thread(self._log.end_offsets, self._topic))[0]
        self.state.lag_records, self.state.unread = max(end - self.state.offset, 0), ""
        LAG_RECORDS.labels(topic=self._topic, partition="0").set(self.state.lag_records)
        if self.state.samples_until_us:
            DELTA_AGE_S.set((self._clock.now_us() - self.state.samples_until_us) / 1e6)
        self._say()

    def _say(self) -> None:
        line = self.state.line()
        if line != self._told:
            self._told = line
            self._tell(self.state)


class DeltaFollower(Follower):
    """Into a worker's models and index."""

    def __init__(
        self, log: Log, topic: str, service: ScoringService, clock: Clock, tell: Callable[[Following], None]
    ) -> None:
        """tell: as Follower."""
        super().__init__(log, topic, service.models.run_id, clock, tell)
        self._service = service

    async def _offered(self, value: bytes, part: delta_pb2.Delta) -> None:
        while True:
            try:
                applied = await self._service.compute.run(
                    "delta", partial(self._service.take_delta, value), Deadline.never()
                )
                break
            except Overloaded:  # requests come first; the topic keeps what waits
                await asyncio.sleep(_POLL_S)
        if applied:
            self._applied(self._service.models.sequence, self._service.models.samples_until_us)

    def _refused(self, error: Double11Error) -> None:
        self.state.stopped = str(error)

    async def _idle(self) -> None:
        """Go on with what did not fit in the index when its delta was applied."""
        with suppress(Overloaded):
            await self._service.compute.run("reindex", self._service.reindex, Deadline.never())


class RowFollower(Follower):
    """Into the rows that a gateway's sources look in."""

    def __init__(self, log: Log, topic: str, run_id: str, rows: FreshRows, clock: Clock) -> None:
        """rows: where they go."""
        super().__init__(log, topic, run_id, clock)
        self._rows = rows

    def status(self) -> admin_pb2.PartStatus:
        """For AdminService."""
        detail = f"{self.state.line()}, {len(self._rows)} rows"
        return admin_pb2.PartStatus(name="indexes", state="degraded" if self.state.degraded else "ok", detail=detail)

    async def _offered(self, value: bytes, part: delta_pb2.Delta) -> None:
        for rows in part.index_rows:
            self._rows.put(rows.index, decoded(rows))
        await asyncio.sleep(0)  # requests that came meanwhile
        if part.part == part.num_parts - 1:
            self._applied(part.sequence, part.samples_until_us)

    def _refused(self, error: Double11Error) -> None:
        """The rows before stand."""

    async def _idle(self) -> None:
        """There is nothing left over."""


def decoded(rows: delta_pb2.IndexRows) -> IndexRows:
    """The rows of a message. Raises: CorruptData for columns that contradict each other."""
    try:
        entry_key, score = np.frombuffer(rows.entry_keys, "<i8"), np.frombuffer(rows.scores_f32, "<f4")
    except ValueError as error:  # no whole number of them
        raise _unreadable(
            f"{len(rows.entry_keys)} and {len(rows.scores_f32)} bytes", "8 and 4 bytes an entry"
        ) from error
    key = np.array(rows.keys, np.uint64).view(np.int64)
    return IndexRows(key=key, num=np.array(rows.num_entries, np.int64), entry_key=entry_key, score=score)


def _unreadable(came: str, expected: str) -> CorruptData:
    return CorruptData("delta", came=came, expected=expected, fix="Find out who wrote this record; skip it.")
