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
_RETRY_AFTER_MS = 1_000
_log = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record for the log; without a partition it goes to murmur2(key)."""

    topic: str
    key: bytes
    value: bytes
    headers: Mapping[str, bytes] = field(default_factory=dict)
    partition: int | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """Records that become durable, or fail, together; num_bytes: their keys and values."""

    records: Sequence[Record]
    num_bytes: int
    done: Callable[[Double11Error | None], object]


class LogWriter:
    """Appends records durably, in the order given. `close` flushes what is waiting."""

    def __init__(self, producer: Producer, queue_bytes_max: int) -> None:
        """queue_bytes_max: keys and values waiting. The thread is started now."""
        self._producer, self._queue_bytes_max = producer, queue_bytes_max
        self._queue: queue.SimpleQueue[_Group | None] = queue.SimpleQueue()  # bounded by _waiting_bytes
        self._waiting_bytes, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def offer(self, records: Sequence[Record], done: Callable[[Double11Error | None], object]) -> bool:
        """Queue records without waiting; False when too much is waiting, and then `done` is never called.

        done: called on the writer's thread with None once durable, else with the error.
        """
        group = _Group(records, sum(len(r.key) + len(r.value) for r in records), done)
        with self._lock:
            if self._waiting_bytes + group.num_bytes > self._queue_bytes_max:
                return False
            self._waiting_bytes += group.num_bytes
        self._queue.put(group)
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
                came=f"more than {self._queue_bytes_max} bytes waiting",
                expected="room in the queue of [serving] log_queue_bytes_max",
                fix="Slow down and send again later with the same event_ids.",
                retry_after_ms=_RETRY_AFTER_MS,
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
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        closing = False
        while not closing:
            groups, closing = self._next_groups()
            failure: Double11Error | None = None
            try:
                for group in groups:
                    for r in group.records:
                        self._producer.send(r.topic, r.key, r.value, r.headers, r.partition)
                self._producer.flush()
            except Double11Error as error:
                _log.error("log_append_failed", records=sum(len(g.records) for g in groups), error=str(error))
                failure = error
            with self._lock:
                self._waiting_bytes -= sum(g.num_bytes for g in groups)
            for group in groups:
                group.done(failure)

    def _next_groups(self) -> tuple[list[_Group], bool]:
        """What is waiting, at least one group or the end; whether it is the end."""
        groups: list[_Group] = []
        num_records = 0
        while num_records < _GROUP_RECORDS_MAX:
            try:
                group = self._queue.get(block=not groups)
            except queue.Empty:
                break
            if group is None:
                return groups, True
            groups.append(group)
            num_records += len(group.records)
        return groups, False
