"""What could not be applied: put aside with its cause, listed, and requeued with the same event id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from double11.v1.event_pb2 import DeadLetter

from streaming.codec import Rejected
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION, Log, Producer, RecordBatch, read_all

PAYLOAD_BYTES_MAX = 64 << 10
_DETAIL_CHARS_MAX = 256


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
    producer, done, cut = log.producer(), 0, 0
    sources: dict[tuple[str, int, int], bytes] = {}
    chosen = [m for m in letters(log, topic) if cause is None or m.cause == cause]
    for letter in chosen:
        if letter.payload_bytes > len(letter.payload):
            cut += 1
        else:
            sources[letter.topic, letter.partition, letter.offset] = letter.payload
    for (source, partition, offset), payload in sources.items():
        key = _key_of(log, source, partition, offset)
        producer.send(source, key, payload, {SCHEMA_HEADER: SCHEMA_VERSION}, partition)
        done += 1
    producer.close()
    return done, cut


def _key_of(log: Log, topic: str, partition: int, offset: int) -> bytes:
    """The key of the record at some coordinates, b"" when it is gone."""
    consumer = log.consumer(topic, {partition: offset})
    batches = consumer.poll(records_max=1, bytes_max=1)
    consumer.close()
    return batches[0].keys[0] if batches and int(batches[0].offset[0]) == offset else b""
