"""Follows the deltas topic: what online training publishes goes into this worker's models, whole or not at all.

A worker starts from its run and reads the topic from its first record; records of other runs are not its business.
Applying happens where scoring happens, so no call sees half a delta. After a gap (records that are gone, or bytes that
are no delta) the models stay at the last whole delta, and the worker says so until it is restarted with a newer run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from double11.v1 import delta_pb2
from google.protobuf.message import DecodeError

from recsys.core import BadInput, Clock, CorruptData, Deadline, Double11Error, Overloaded, VersionMismatch, logging
from recsys.core.metrics import DELTA_AGE_S, DELTA_SEQUENCE, DELTAS, LAG_RECORDS
from streaming.log import Log, RecordBatch

if TYPE_CHECKING:
    from recsys.serving.scoring_service import ScoringService

_log = logging.get_logger(__name__)
_RECORDS_MAX, _BYTES_MAX = 256, 8 << 20
_POLL_S, _RETRY_S = 0.1, 2.0


@dataclass(slots=True)
class Following:
    """Where a worker is. stopped: why it follows no more, empty while it does."""

    run_id: str
    sequence: int = 0
    samples_until_us: int = 0
    offset: int = 0
    lag_records: int = 0
    stopped: str = ""


class DeltaFollower:
    """Reads deltas of one run into its models. `run` until cancelled."""

    def __init__(
        self,
        log: Log,
        topic: str,
        service: ScoringService,
        clock: Clock,
        tell: Callable[[str], None],
    ) -> None:
        """tell: called with a line on where the worker is, when that has changed."""
        self._log, self._topic, self._service, self._clock, self._tell = log, topic, service, clock, tell
        self.state = Following(service.models.run_id)
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
                    await self._reindexed()
                    await asyncio.sleep(_POLL_S)
        finally:
            await asyncio.to_thread(consumer.close)

    async def _take(self, batch: RecordBatch) -> None:
        for offset, value in zip(batch.offset.tolist(), batch.values, strict=True):
            if not self._ours(value):
                continue
            try:
                await self._offered(value)
            except (VersionMismatch, CorruptData, BadInput) as error:
                DELTAS.labels(outcome="refused").inc()
                self.state.stopped = str(error)
                _log.error("delta_refused", offset=offset, sequence=self.state.sequence, error=str(error))
                return
        self.state.offset = batch.next_offset

    async def _offered(self, value: bytes) -> None:
        while True:
            try:
                applied = await self._service.compute.run(
                    "delta", partial(self._service.take_delta, value), Deadline.never()
                )
                break
            except Overloaded:  # requests come first; the topic keeps what waits
                await asyncio.sleep(_POLL_S)
        if applied:
            self.state.sequence, self.state.samples_until_us = (
                self._service.models.sequence,
                self._service.models.samples_until_us,
            )
            DELTAS.labels(outcome="applied").inc()
            DELTA_SEQUENCE.labels(run_id=self.state.run_id).set(self.state.sequence)
            _log.info("delta_applied", run=self.state.run_id, sequence=self.state.sequence)

    async def _reindexed(self) -> None:
        """Go on with what did not fit in the index when its delta was applied."""
        with suppress(Overloaded):
            await self._service.compute.run("reindex", self._service.reindex, Deadline.never())

    def _ours(self, value: bytes) -> bool:
        try:
            run_id = delta_pb2.Delta.FromString(value).run_id
        except DecodeError:
            return True  # `offer` says what is wrong with it
        if run_id == self.state.run_id:
            return True
        DELTAS.labels(outcome="other-run").inc()
        if run_id not in self._others:
            self._others.add(run_id)
            _log.warning("deltas_of_another_run_left_out", came=run_id, serving=self.state.run_id)
        return False

    async def _say_lag(self) -> None:
        end = (await asyncio.to_thread(self._log.end_offsets, self._topic))[0]
        self.state.lag_records = max(end - self.state.offset, 0)
        LAG_RECORDS.labels(topic=self._topic, partition="0").set(self.state.lag_records)
        if self.state.samples_until_us:
            DELTA_AGE_S.set((self._clock.now_us() - self.state.samples_until_us) / 1e6)
        line = f"run {self.state.run_id}, delta {self.state.sequence}"
        line += f", {self.state.lag_records} records behind" if self.state.lag_records else ""
        line += f", stopped: {self.state.stopped}" if self.state.stopped else ""
        if line != self._told:
            self._told = line
            self._tell(line)
