"""One thread that owns the log's producer: group commit for published events and impressions.

gRPC handlers run on the event loop and must not wait for a disk. They hand records to a bounded queue; the thread
sends everything that is waiting, flushes once, and then acknowledges the lot.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from recsys.core import Deadline, DeadlineExceeded, Double11Error, Overloaded, logging
from streaming.log import Producer

_GROUP_RECORDS_MAX = 2_000  # records of one flush: bounds how long the first of a group waits for the rest
_log = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record for the log; the partition is murmur2(key)."""

    topic: str
    key: bytes
    value: bytes
    headers: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Group:
    """Records that become durable, or fail, together; `done` is called on the writer's thread."""

    records: Sequence[Record]
    done: Callable[[Double11Error | None], object]


class LogWriter:
    """Appends records durably, in the order given. `close` flushes what is waiting."""

    def __init__(self, producer: Producer, queue_items_max: int) -> None:
        """queue_items_max: groups waiting; the thread is started now."""
        self._producer = producer
        self._queue: queue.Queue[_Group | None] = queue.Queue(queue_items_max)
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def offer(self, records: Sequence[Record], done: Callable[[Double11Error | None], object]) -> bool:
        """Queue records without waiting; False when the queue is full, and then `done` is never called.

        done: called on the writer's thread with None once durable, else with the error.
        """
        try:
            self._queue.put_nowait(_Group(records, done))
        except queue.Full:
            return False
        return True

    async def append(self, records: Sequence[Record], deadline: Deadline) -> None:
        """Return once the records are durable.

        Raises: Overloaded when too much is waiting; DeadlineExceeded, and then they may or may not become durable
        (event_ids make a repeat harmless); whatever the log raises.
        """
        loop = asyncio.get_running_loop()
        durable: asyncio.Future[None] = loop.create_future()

        def settle(error: Double11Error | None) -> None:
            if durable.done():  # the caller stopped waiting
                return
            if error is None:
                durable.set_result(None)
            else:
                durable.set_exception(error)

        if not self.offer(records, lambda error: loop.call_soon_threadsafe(settle, error)):
            raise Overloaded(
                "durable log",
                came=f"{self._queue.maxsize} groups of records waiting",
                expected="room in the queue of [serving] log_queue_items_max",
                fix="Slow down and send again later with the same event_ids.",
            )
        try:
            async with asyncio.timeout(deadline.timeout_s()):
                await durable
        except TimeoutError as error:
            raise DeadlineExceeded(
                "durable log",
                came="no acknowledgement in time",
                expected="one before the deadline",
                fix="Send again with the same event_ids: repeats are dropped.",
            ) from error

    def close(self, timeout_s: float) -> bool:
        """Make everything offered so far durable and stop; False when that took too long."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while groups := self._next_groups():
            closing = groups[-1] is None
            taken = [g for g in groups if g is not None]
            failure: Double11Error | None = None
            try:
                for group in taken:
                    for r in group.records:
                        self._producer.send(r.topic, r.key, r.value, r.headers)
                self._producer.flush()
            except Double11Error as error:
                _log.error("log_append_failed", records=sum(len(g.records) for g in taken), error=str(error))
                failure = error
            for group in taken:
                group.done(failure)
            if closing:
                return

    def _next_groups(self) -> list[_Group | None]:
        groups: list[_Group | None] = [self._queue.get()]
        count = 0
        while groups[-1] is not None and count < _GROUP_RECORDS_MAX:
            count += len(groups[-1].records)
            try:
                groups.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return groups
