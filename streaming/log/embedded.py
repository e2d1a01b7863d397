"""The embedded log: one LMDB environment per topic under PATH/log, shared by any number of processes.

Keys are partition (2 bytes) and offset (8 bytes), big-endian, so that a partition is one run of the tree. A flush is
one transaction, fsynced before it returns; threads that flush together share one.
"""

from __future__ import annotations

import os
import struct
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Self

import lmdb
import numpy as np

from recsys.core import Clock, CorruptData, NotFound, VersionMismatch, WallClock, embedded
from streaming.config import EmbeddedLogConfig
from streaming.log.base import (
    Consumer,
    EverythingAssigned,
    Membership,
    Producer,
    RecordBatch,
    check_size,
    partition_for,
)

_KEY = struct.Struct(">HQ")
_HEAD = struct.Struct("<qHHH")
_HEAD_DTYPE = np.dtype([("append_us", "<i8"), ("key", "<u2"), ("headers", "<u2"), ("format", "<u2")])  # the same
_PIECE_RECORDS = 512
_HEADER = struct.Struct("<BH")
_FORMAT = 2
_PARTITIONS = b"number-of-partitions"  # its length differs from a record key
_NO_HEADERS: Mapping[str, bytes] = {}


class EmbeddedLog:
    """A Log in a folder. clock gives the append times."""

    def __init__(self, path: Path, config: EmbeddedLogConfig | None = None, clock: Clock | None = None) -> None:
        self.path = path / "log"
        self.config = config or EmbeddedLogConfig()
        self.clock = clock or WallClock()
        self._topics: dict[str, tuple[lmdb.Environment, int]] = {}
        self._lock = threading.Lock()

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """Create the topics that are missing. Raises: VersionMismatch for another number of partitions."""
        self._make_id()
        for topic, number in partitions.items():
            env = embedded.acquire(self.path / topic, self.config.map_bytes_max, sequential=True)
            try:
                with embedded.writing(env) as txn:
                    txn.put(_PARTITIONS, str(number).encode(), overwrite=False)
                    stored = int(txn.get(_PARTITIONS) or 0)
            finally:
                embedded.release(self.path / topic)
            if stored != number:
                raise VersionMismatch(
                    f"topic {topic} in {self.path}",
                    came=f"{number} partitions",
                    expected=f"{stored}, as it was created with",
                    fix="Set [streaming] partitions to that, or start a new log: P never changes in place.",
                )

    def env(self, topic: str) -> tuple[lmdb.Environment, int]:
        """Environment and number of partitions of a topic. Raises: NotFound."""
        with self._lock:
            if topic not in self._topics:
                if not (self.path / topic / "data.mdb").is_file():
                    raise self._missing(topic)
                env = embedded.acquire(self.path / topic, self.config.map_bytes_max, sequential=True)
                with env.begin() as txn:
                    stored = txn.get(_PARTITIONS)
                if stored is None:
                    embedded.release(self.path / topic)
                    raise self._missing(topic)
                self._topics[topic] = (env, int(stored))
            return self._topics[topic]

    def log_id(self) -> str:
        """Made with the first topic. Raises: NotFound."""
        path = self.path / "log_id"
        if not path.is_file():
            raise self._missing("events")
        return f"embedded:{path.read_text('utf-8')}"

    def num_partitions(self, topic: str) -> int:
        """Partitions of a topic. Raises: NotFound."""
        return self.env(topic)[1]

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """First offset still there, by partition; 0 for an empty one."""
        env, number = self.env(topic)
        with env.begin() as txn, txn.cursor() as cursor:
            found = {}
            for p in range(number):
                at = _KEY.unpack(cursor.key()) if cursor.set_range(_KEY.pack(p, 0)) and _is_record(cursor) else (-1, 0)
                found[p] = at[1] if at[0] == p else 0
            return found

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Offset after the last record, by partition."""
        env, number = self.env(topic)
        with env.begin() as txn:
            return {p: _end(txn, p) for p in range(number)}

    def producer(self) -> Producer:
        """A producer, usable from several threads."""
        return EmbeddedProducer(self)

    def consumer(self, topic: str, offsets: Mapping[int, int]) -> Consumer:
        """A consumer. Raises: NotFound."""
        return EmbeddedConsumer(self, topic, offsets)

    def membership(self, group: str, topic: str, *, alone: bool = False) -> Membership:
        """Everything: one process reads an embedded log for one store. Raises: NotFound."""
        return EverythingAssigned(self.num_partitions(topic))

    def close(self) -> None:
        """Close every topic."""
        with self._lock:
            for topic in self._topics:
                embedded.release(self.path / topic)
            self._topics.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _make_id(self) -> None:
        """Whole or absent, and the first one stays, however many processes come at once."""
        path = self.path / "log_id"
        if not path.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / f".log_id.{uuid.uuid4().hex}"
            with temporary.open("x", encoding="utf-8") as file:
                file.write(uuid.uuid4().hex)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                path.hardlink_to(temporary)
            temporary.unlink()

    def _missing(self, topic: str) -> NotFound:
        return NotFound(
            f"topic {topic}",
            came=f"none in {self.path}",
            expected="an existing log",
            fix=f"Create it: double11 streaming init --log embedded:{self.path.parent}",
        )


class EmbeddedProducer:
    """Buffers records and writes them in one transaction per topic."""

    def __init__(self, log: EmbeddedLog) -> None:
        self._log = log
        self._buffer: dict[str, list[tuple[int, bytes, bytes, Mapping[str, bytes]]]] = {}
        self._records = self._bytes = 0
        self._buffer_lock = threading.Lock()
        self._write_lock = threading.Lock()

    def send(
        self,
        topic: str,
        key: bytes,
        value: bytes,
        headers: Mapping[str, bytes] | None = None,
        partition: int | None = None,
    ) -> None:
        """Buffer one record. Raises: BadInput for a value that is too large, or the partition; NotFound for a topic."""
        check_size(topic, value)
        partition = partition_for(topic, key, self._log.num_partitions(topic), partition)
        with self._buffer_lock:
            self._buffer.setdefault(topic, []).append((partition, key, value, headers or _NO_HEADERS))
            self._records += 1
            self._bytes += len(value)
            config = self._log.config
            full = self._records >= config.buffer_records_max or self._bytes >= config.buffer_bytes_max
        if full:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered; fsynced on return. A thread that waited here finds its records already written."""
        with self._write_lock:
            with self._buffer_lock:
                buffer, self._buffer = self._buffer, {}
                self._records = self._bytes = 0
            for topic, records in buffer.items():
                self._write(topic, records)

    def close(self) -> None:
        """Flush."""
        self.flush()

    def abandon(self) -> None:
        """Drop what is buffered."""
        with self._buffer_lock:
            self._buffer.clear()
            self._records = self._bytes = 0

    def _write(self, topic: str, records: list[tuple[int, bytes, bytes, Mapping[str, bytes]]]) -> None:
        env, _ = self._log.env(topic)
        with embedded.writing(env) as txn, txn.cursor() as cursor:
            now_us = self._log.clock.now_us()
            end: dict[int, int] = {}
            items = []
            for partition, key, value, headers in records:
                offset = end[partition] if partition in end else _end(txn, partition)
                end[partition] = offset + 1
                items.append((_KEY.pack(partition, offset), _pack(now_us, key, value, headers)))
            items.sort()
            cursor.putmulti(items)


class EmbeddedConsumer:
    """Reads partitions in turn, each within its share of the bounds."""

    def __init__(self, log: EmbeddedLog, topic: str, offsets: Mapping[int, int]) -> None:
        self._log, self._topic = log, topic
        log.env(topic)
        self.assign(offsets)

    def assign(self, offsets: Mapping[int, int]) -> None:
        """Read these instead."""
        self._next = dict(offsets)

    def poll(self, *, records_max: int, bytes_max: int) -> list[RecordBatch]:
        """What is there now; the partition read first goes to the back of the line. Raises: CorruptData."""
        env, _ = self._log.env(self._topic)
        batches, left = [], len(self._next)
        with env.begin() as txn, txn.cursor() as cursor:
            for partition in list(self._next):
                share_records, share_bytes = -(-records_max // left), -(-bytes_max // left)
                batch = self._read(cursor, partition, share_records, share_bytes)
                left -= 1
                if batch is not None:
                    batches.append(batch)
                    records_max -= len(batch)
                    bytes_max -= sum(map(len, batch.values))
                if records_max <= 0 or bytes_max <= 0:
                    break
        for batch in batches:
            del self._next[batch.partition]
            self._next[batch.partition] = batch.next_offset
        return batches

    def close(self) -> None:
        """Nothing is held between polls."""

    def _read(self, cursor: lmdb.Cursor, partition: int, records_max: int, bytes_max: int) -> RecordBatch | None:
        if not cursor.set_range(_KEY.pack(partition, self._next[partition])):
            return None
        found: list[tuple[bytes, bytes]] = []
        prefix, items = _KEY.pack(partition, 0)[:2], cursor.iternext()
        while len(found) < records_max and bytes_max > 0:
            piece = list(islice(items, min(_PIECE_RECORDS, records_max - len(found))))
            mine = [(bytes(at), bytes(r)) for at, r in piece if len(at) == _KEY.size and at[:2] == prefix]
            for n, (_, record) in enumerate(mine, 1):
                bytes_max -= len(record)
                if bytes_max <= 0:
                    mine = mine[:n]
                    break
            found += mine
            if len(mine) < _PIECE_RECORDS:
                break
        return _batch_of(self._topic, partition, found) if found else None


def _is_record(cursor: lmdb.Cursor) -> bool:
    return len(cursor.key()) == _KEY.size


def _end(txn: lmdb.Transaction, partition: int) -> int:
    """Offset after the last record of a partition."""
    with txn.cursor() as cursor:
        # Step back from where the next partition would begin.
        found = cursor.prev() if cursor.set_range(_KEY.pack(partition + 1, 0)) else cursor.last()
        while found and not _is_record(cursor):
            found = cursor.prev()
        at, offset = _KEY.unpack(cursor.key()) if found else (-1, -1)
        return int(offset) + 1 if at == partition else 0


def _pack(append_us: int, key: bytes, value: bytes, headers: Mapping[str, bytes]) -> bytes:
    block = _block(tuple(headers.items()))
    return b"".join((_HEAD.pack(append_us, len(key), len(block), _FORMAT), key, block, value))


@lru_cache(maxsize=1024)
def _block(headers: tuple[tuple[str, bytes], ...]) -> bytes:
    """Headers as bytes; most records carry one of a few."""
    named = [(name.encode(), content) for name, content in headers]
    return b"".join(p for name, content in named for p in (_HEADER.pack(len(name), len(content)), name, content))


def _batch_of(topic: str, partition: int, found: list[tuple[bytes, bytes]]) -> RecordBatch:
    """Records of one partition. Raises: CorruptData."""
    offset = np.frombuffer(b"".join([at[2:] for at, _ in found]), ">u8").astype(np.int64)
    head = np.frombuffer(b"".join([r[: _HEAD.size] for _, r in found]), _HEAD_DTYPE)
    if (head["format"] != _FORMAT).any():
        raise CorruptData(
            f"{topic}, partition {partition}, from offset {offset[0]}",
            came=f"record format {head['format'].max()}",
            expected=str(_FORMAT),
            fix="Read it with the double11 release that wrote it.",
        )
    key_end = (_HEAD.size + head["key"].astype(np.int64)).tolist()
    value_at = (_HEAD.size + head["key"].astype(np.int64) + head["headers"]).tolist()
    keys = [r[_HEAD.size : a] for (_, r), a in zip(found, key_end, strict=True)]
    values = [r[b:] for (_, r), b in zip(found, value_at, strict=True)]
    headers = [_headers(r[a:b]) for (_, r), a, b in zip(found, key_end, value_at, strict=True)]
    return RecordBatch(topic, partition, offset, head["append_us"].astype(np.int64), keys, values, headers)


@lru_cache(maxsize=1024)
def _headers(block: bytes) -> Mapping[str, bytes]:
    """The inverse of `_block`."""
    headers, at = {}, 0
    while at < len(block):
        name_bytes, content_bytes = _HEADER.unpack_from(block, at)
        at += _HEADER.size
        name, at = block[at : at + name_bytes].decode(), at + name_bytes
        headers[name], at = block[at : at + content_bytes], at + content_bytes
    return MappingProxyType(headers)
