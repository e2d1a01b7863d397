"""What could not be applied: put aside with its cause, listed, and requeued with the same event id."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from double11.v1.event_pb2 import DeadLetter, Event, Impression
from google.protobuf.message import DecodeError

from recsys.core.murmur2 import partition_of
from streaming.codec import MISPLACED, UNKNOWN_VERSION, Rejected, owner_of, record_key
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION, Log, Producer, RecordBatch, read_all

PAYLOAD_BYTES_MAX = 64 << 10
_DETAIL_CHARS_MAX = 256
_KEY_S, _PAUSE_S = 10.0, 0.005
_LOST_VERSION = b"lost"


def put_aside(producer: Producer, topic: str, source: RecordBatch, row: int, rejected: Rejected, at_us: int) -> None:
    """Send one record's dead letter. Its key is the source coordinates, so that readers can drop repeats."""
    value, offset = source.values[row], int(source.offset[row])
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
    )
    key = f"{source.topic}/{source.partition}/{offset}".encode()
    producer.send(topic, key, letter.SerializeToString(), {SCHEMA_HEADER: SCHEMA_VERSION})


def letters(log: Log, topic: str) -> Iterator[DeadLetter]:
    """Every dead letter once, in the order put aside."""
    seen: set[bytes] = set()
    for batch in read_all(log, topic):
        for key, value in zip(batch.keys, batch.values, strict=True):
            if key not in seen:
                seen.add(key)
                yield DeadLetter.FromString(value)


def requeue(log: Log, topic: str, cause: str | None) -> tuple[int, int]:
    """Send payloads back to the topics they came from, unchanged; returns (requeued, left because cut to 64 KiB).

    cause: only dead letters of this cause. Requeueing twice is harmless: the event ids are the same.
    """
    producer, cut = log.producer(), 0
    chosen: dict[tuple[str, int, int], DeadLetter] = {}
    for letter in letters(log, topic):
        if cause is None or letter.cause == cause:
            if letter.payload_bytes > len(letter.payload):
                cut += 1
            else:
                chosen[letter.topic, letter.partition, letter.offset] = letter
    for (source, partition, offset), letter in chosen.items():
        (key, headers), at = _record_at(log, source, partition, offset), partition
        if letter.cause == MISPLACED:
            at = partition_of(_owner(letter), log.num_partitions(source))
        if not headers:  # gone: whatever version was not known then, nobody knows now
            headers = {SCHEMA_HEADER: _LOST_VERSION if letter.cause == UNKNOWN_VERSION else SCHEMA_VERSION}
        producer.send(source, key, letter.payload, headers, at)
    producer.close()
    return len(chosen), cut


def _owner(letter: DeadLetter) -> bytes:
    """The user or item whose partition a record belongs to."""
    with suppress(DecodeError):
        event = Event.FromString(letter.payload)
        if event.WhichOneof("body") is not None:
            return owner_of(record_key(event))
    return Impression.FromString(letter.payload).user_id.encode()


def _record_at(log: Log, topic: str, partition: int, offset: int) -> tuple[bytes, Mapping[str, bytes]]:
    """Key and headers of the record at some coordinates, nothing when it is gone."""
    gone: tuple[bytes, Mapping[str, bytes]] = (b"", {})
    if not log.begin_offsets(topic)[partition] <= offset < log.end_offsets(topic)[partition]:
        return gone
    consumer, deadline_s = log.consumer(topic, {partition: offset}), time.monotonic() + _KEY_S
    try:
        while time.monotonic() < deadline_s:
            for batch in consumer.poll(records_max=1, bytes_max=1):
                if len(batch):
                    return (batch.keys[0], batch.headers[0]) if int(batch.offset[0]) == offset else gone
            time.sleep(_PAUSE_S)
    finally:
        consumer.close()
    return gone
