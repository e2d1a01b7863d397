"""What could not be applied: put aside with its cause, listed, and requeued with the same event id.

What has been requeued is said on the topic itself, by a mark behind the letters: so another call, or one after a
SIGKILL, goes on where the last one was, wherever it runs. A letter is sent back durably before its mark is; at worst a
batch is sent twice, with the same event ids.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from double11.v1.event_pb2 import DeadLetter, Event, Impression
from google.protobuf.message import DecodeError

from recsys.core.murmur2 import partition_of
from streaming.codec import MISPLACED, Rejected, owner_of, record_key
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION, STRESS_HEADER, Log, Producer, RecordBatch, read_all

PAYLOAD_BYTES_MAX = 64 << 10
_DETAIL_CHARS_MAX = 256
_ENVELOPE_BYTES_MAX = 4 << 10  # key, and headers
_BATCH_RECORDS_MAX, _BATCH_BYTES_MAX = 1_000, 8 << 20  # sent back between two marks
_REMEMBERED = 1 << 16  # letters among which one that was put aside twice is noticed
_MARK = b"requeued"
_Done = Mapping[tuple[int, str], int]


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter as listed, without its payload. requeued: whether it has been sent back since."""

    cause: str
    topic: str
    partition: int
    offset: int
    event_id: str
    payload_bytes: int
    sha256: str
    at_us: int
    detail: str
    requeued: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """The newest letters, the oldest of them first; and how many there are by cause, waiting and requeued."""

    newest: tuple[Letter, ...]
    waiting: Mapping[str, int]
    requeued: Mapping[str, int]


@dataclass(slots=True)
class Requeued:
    """Letters sent back by this call; left because only their first 64 KiB were kept; sent back by earlier calls."""

    sent: int = 0
    cut: int = 0
    earlier: int = 0
    by_cause: Counter[str] = field(default_factory=Counter)


def put_aside(producer: Producer, topic: str, source: RecordBatch, row: int, rejected: Rejected, at_us: int) -> None:
    """Send one record's dead letter. Its key is the source coordinates, so that readers can drop repeats."""
    value, offset, headers = source.values[row], int(source.offset[row]), source.headers[row]
    if sum(len(k) + len(v) for k, v in headers.items()) > _ENVELOPE_BYTES_MAX:
        headers = {k: headers[k][:64] for k in (SCHEMA_HEADER, STRESS_HEADER) if k in headers}
    letter = DeadLetter(
        cause=rejected.cause,
        detail=rejected.detail[:_DETAIL_CHARS_MAX],
        topic=source.topic,
        partition=source.partition,
        offset=offset,
        payload_sha256=hashlib.sha256(value).digest(),
        payload=value[:PAYLOAD_BYTES_MAX],
        payload_bytes=len(value),
        at_us=at_us,
        event_id=rejected.event_id,
        key=source.keys[row][:_ENVELOPE_BYTES_MAX],
        headers=headers,
    )
    key = f"{source.topic}/{source.partition}/{offset}".encode()
    producer.send(topic, key, letter.SerializeToString(), {SCHEMA_HEADER: SCHEMA_VERSION})


def letters(log: Log, topic: str) -> Iterator[DeadLetter]:
    """Every dead letter once, in the order put aside."""
    return (letter for batch in _batches(log, topic) for _, letter in batch.letters)


def survey(log: Log, topic: str, *, cause: str | None = None, limit: int = 100) -> Survey:
    """The `limit` newest letters, of one cause or all, and counts of all. Memory is that of the letters listed."""
    done, newest = _done(log, topic), deque[Letter](maxlen=limit)
    waiting, requeued = Counter[str](), Counter[str]()
    for batch in _batches(log, topic):
        for at, m in batch.letters:
            is_done = _is_done(done, batch.partition, at, m)
            (requeued if is_done else waiting)[m.cause] += 1
            if cause in (None, m.cause):
                digest = m.payload_sha256.hex()
                newest.append(
                    Letter(
                        m.cause,
                        m.topic,
                        m.partition,
                        m.offset,
                        m.event_id,
                        m.payload_bytes,
                        digest,
                        m.at_us,
                        m.detail,
                        is_done,
                    )
                )
    return Survey(tuple(newest), waiting, requeued)


def requeue(
    log: Log,
    topic: str,
    cause: str | None = None,
    *,
    again: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> Requeued:
    """Send payloads back to the topics they came from, unchanged, in bounded batches; on_batch is told their sizes.

    cause: only dead letters of this cause. again: also what an earlier call has sent back; harmless but for the work,
    since the event ids are the same.
    Raises: Unavailable, Overloaded; what was sent back until then is marked, and the next call goes on behind it.
    """
    done: _Done = {} if again else _done(log, topic)
    found, producer = Requeued(), log.producer()
    try:
        for batch in _batches(log, topic):
            sent = 0
            for at, letter in batch.letters:
                if cause not in (None, letter.cause):
                    continue
                if _is_cut(letter):
                    found.cut += 1
                elif _is_done(done, batch.partition, at, letter):
                    found.earlier += 1
                else:
                    _send_back(log, producer, letter)
                    found.by_cause[letter.cause] += 1
                    sent += 1
            if sent:
                producer.flush()  # durable before the mark says so
                mark = DeadLetter.Requeued(cause=cause or "", partition=batch.partition, next_offset=batch.next_offset)
                value = DeadLetter(requeued=mark).SerializeToString()
                producer.send(topic, _MARK, value, {SCHEMA_HEADER: SCHEMA_VERSION})
                found.sent += sent
                if on_batch is not None:
                    on_batch(sent)
    finally:
        producer.close()
    return found


@dataclass(frozen=True, slots=True)
class _Batch:
    partition: int
    next_offset: int
    letters: list[tuple[int, DeadLetter]]  # with their offsets


def _batches(log: Log, topic: str) -> Iterator[_Batch]:
    """Letters, each once among its neighbours: after a crash a step puts the same ones aside again."""
    seen: OrderedDict[bytes, None] = OrderedDict()
    for batch in read_all(log, topic, records_max=_BATCH_RECORDS_MAX, bytes_max=_BATCH_BYTES_MAX):
        found = []
        for offset, key, value in zip(batch.offset.tolist(), batch.keys, batch.values, strict=True):
            if key != _MARK and key not in seen:
                found.append((offset, DeadLetter.FromString(value)))
                seen[key] = None
                if len(seen) > _REMEMBERED:
                    seen.popitem(last=False)
        yield _Batch(batch.partition, batch.next_offset, found)


def _done(log: Log, topic: str) -> _Done:
    """By partition and cause ("" = all), up to which offset letters have been sent back."""
    done: dict[tuple[int, str], int] = defaultdict(int)
    for batch in read_all(log, topic, records_max=_BATCH_RECORDS_MAX, bytes_max=_BATCH_BYTES_MAX):
        for key, value in zip(batch.keys, batch.values, strict=True):
            if key == _MARK:
                m = DeadLetter.FromString(value).requeued
                done[m.partition, m.cause] = max(done[m.partition, m.cause], m.next_offset)
    return dict(done)


def _is_done(done: _Done, partition: int, offset: int, letter: DeadLetter) -> bool:
    upto = max(done.get((partition, ""), 0), done.get((partition, letter.cause), 0))
    return offset < upto and not _is_cut(letter)


def _is_cut(letter: DeadLetter) -> bool:
    return letter.payload_bytes > len(letter.payload)


def _send_back(log: Log, producer: Producer, letter: DeadLetter) -> None:
    """To the partition it was in; a misplaced one to its owner's."""
    at = letter.partition
    if letter.cause == MISPLACED:
        at = partition_of(_owner(letter), log.num_partitions(letter.topic))
    producer.send(letter.topic, letter.key, letter.payload, dict(letter.headers), at)


def _owner(letter: DeadLetter) -> bytes:
    """The user or item whose partition a record belongs to."""
    with suppress(DecodeError):
        event = Event.FromString(letter.payload)
        if event.WhichOneof("body") is not None:
            return owner_of(record_key(event))
    return Impression.FromString(letter.payload).user_id.encode()
