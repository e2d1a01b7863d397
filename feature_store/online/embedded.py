"""The embedded online store: one LMDB environment in PATH/store. One process writes, any number read.

Keys: a 2-byte generation, a letter (u user, i item, s seen, w shown, o offset, t largest event time), the id. A
generation is one namespace: the live one, its shadow for stress tests, and one that `materialize` fills before it is
switched to. The meta record says which is live, so that a switch is one write.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import lmdb

from feature_store.base import ItemFeatures, UserFeatures
from feature_store.commit import Commit, EntryKind
from feature_store.config import EmbeddedStoreConfig
from feature_store.read import item_features, user_features
from feature_store.views import VIEW_SET
from recsys.core import Conflict, CorruptData, Deadline, VersionMismatch, embedded

_META = b"\0\0meta"
_SHADOW = 1 << 15  # generation bit of the stress test's namespace
_LETTER: Mapping[EntryKind, bytes] = {"user": b"u", "item": b"i", "seen": b"s", "shown": b"w"}
_KEY_BYTES_MAX = 500
_WRITER_LOCK = "writer.lock"


class EmbeddedReader:
    """A FeatureReader in any process. Opening an empty folder makes an empty store."""

    def __init__(self, path: Path, config: EmbeddedStoreConfig | None = None) -> None:
        """path: the folder of the `embedded:` URL.

        Raises: CorruptData for a broken store; VersionMismatch for one of another view set.
        """
        self.path = path / "store"
        self._env = embedded.acquire(self.path, (config or EmbeddedStoreConfig()).map_bytes_max)
        with self._env.begin(write=True) as txn:
            meta = {"store_id": uuid.uuid4().hex[:12], "views": VIEW_SET, "generation": 1}
            txn.put(_META, json.dumps(meta).encode(), overwrite=False)

    @property
    def view_set(self) -> str:
        """Version of the view set that is read."""
        return VIEW_SET

    @property
    def store_id(self) -> str:
        """Written at creation."""
        with self._env.begin() as txn:
            return str(self._meta(txn)["store_id"])

    def max_event_time_us(self) -> int:
        """The largest event time applied; 0 for an empty store."""
        with self._env.begin() as txn:
            stored = txn.get(self._prefix(txn, b"t"))
            return int.from_bytes(bytes(stored), "little") if stored else 0

    async def user(self, user_id: str, as_of_us: int, deadline: Deadline) -> UserFeatures:
        """All features of one user. Raises: DeadlineExceeded, CorruptData, VersionMismatch."""
        deadline.require("features of a user")
        return user_features(user_id, self.load("user", [user_id])[0], as_of_us)

    async def items(self, item_ids: Sequence[str], as_of_us: int, deadline: Deadline) -> ItemFeatures:
        """Features of N items. Raises: DeadlineExceeded, CorruptData, VersionMismatch."""
        deadline.require("features of items")
        return item_features(self.load("item", item_ids), as_of_us)

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities, b"" for unknown ones."""
        with self._env.begin() as txn:
            prefix, get = self._prefix(txn, _LETTER[kind], shadow), txn.get
            return [get(k, b"") if len(k := prefix + i.encode()) <= _KEY_BYTES_MAX else b"" for i in ids]

    def close(self) -> None:
        """Let go of the environment."""
        embedded.release(self.path)

    def _meta(self, txn: lmdb.Transaction) -> dict[str, Any]:
        try:
            meta: dict[str, Any] = json.loads(bytes(txn.get(_META) or b""))
        except ValueError as error:
            raise CorruptData(
                f"{self.path}, meta record",
                came=str(error),
                expected="JSON",
                fix="Rebuild the store: double11 features materialize DIR --store URL.",
            ) from error
        if meta["views"] != VIEW_SET:
            raise VersionMismatch(
                f"feature store {self.path}",
                came=f"state of view set {meta['views']}",
                expected=f"view set {VIEW_SET}",
                fix="Rebuild it: double11 features materialize DIR --store URL.",
            )
        return meta

    def _prefix(self, txn: lmdb.Transaction, letter: bytes, shadow: bool = False) -> bytes:
        return _prefix(self._meta(txn)["generation"] | (_SHADOW if shadow else 0), letter)


class EmbeddedStore(EmbeddedReader):
    """The one writer. Its lock dies with its process, however that ends."""

    def __init__(self, path: Path, config: EmbeddedStoreConfig | None = None) -> None:
        """Raises: Conflict when another process writes this store; CorruptData, VersionMismatch as the reader."""
        self._lock = _writer_lock(path / "store")
        try:
            super().__init__(path, config)
        except BaseException:
            self._lock.close()
            raise

    def offsets(self, topic: str) -> Mapping[int, int]:
        """Next offset to read, by partition."""
        found = {}
        with self._env.begin() as txn, txn.cursor() as cursor:
            prefix = self._prefix(txn, b"o") + topic.encode() + b"\0"
            if cursor.set_range(prefix):
                for key, value in cursor.iternext():
                    if not bytes(key).startswith(prefix):
                        break
                    found[int.from_bytes(key[len(prefix) :], "big")] = int.from_bytes(value, "little")
        return found

    def unfinished(self) -> None:
        """A step is one transaction."""

    def commit(self, step: Commit) -> None:
        """Take the whole step in one fsynced transaction. Raises: Conflict, Overloaded."""
        try:
            with self._env.begin(write=True) as txn:
                generation = self._meta(txn)["generation"]
                self._check_offsets(txn, generation, step)
                write(txn, generation, step)
        except (lmdb.MapFullError, lmdb.DiskError) as error:
            raise embedded.full(self.path, error) from error

    def close(self) -> None:
        """Let go of the environment and of the lock."""
        super().close()
        self._lock.close()

    def rebuild(self) -> Rebuild:
        """A new, empty generation beside the live one; readers see it after `Rebuild.switch`."""
        return Rebuild(self._env)

    def _check_offsets(self, txn: lmdb.Transaction, generation: int, step: Commit) -> None:
        for o in step.offsets:
            stored = int.from_bytes(txn.get(_offset_key(generation, o.topic, o.partition)) or b"", "little")
            if stored != o.expected:
                raise Conflict(
                    f"offset of {o.topic}, partition {o.partition}, in {self.path}",
                    came=f"a step from {o.expected}",
                    expected=f"from {stored}, which is stored",
                    fix="Another writer was first; start again from the stored offset.",
                )


class Rebuild:
    """Fills a generation that nobody reads yet, then makes it the live one in one write."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        with env.begin(write=True) as txn:
            self._old = json.loads(bytes(txn.get(_META) or b"{}"))["generation"]
            self._generation = self._old % (_SHADOW - 1) + 1
            _drop(txn, self._generation)  # what a rebuild that died has left

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities in the new generation."""
        with self._env.begin() as txn:
            prefix, get = _prefix(self._generation, _LETTER[kind]), txn.get
            return [get(prefix + i.encode(), b"") for i in ids]

    def commit(self, step: Commit) -> None:
        """Write into the new generation."""
        with self._env.begin(write=True) as txn:
            write(txn, self._generation, step)

    def switch(self) -> None:
        """Make the new generation live and drop the old one."""
        with self._env.begin(write=True) as txn:
            meta = json.loads(bytes(txn.get(_META) or b"{}")) | {"views": VIEW_SET, "generation": self._generation}
            txn.put(_META, json.dumps(meta).encode())
        with self._env.begin(write=True) as txn:
            _drop(txn, self._old)
            _drop(txn, self._old | _SHADOW)


def write(txn: lmdb.Transaction, generation: int, step: Commit) -> None:
    """Put a step's state, offsets and largest event time into a generation."""
    for update in step.all_updates:
        prefix = _prefix(generation | (_SHADOW if update.shadow else 0), _LETTER[update.kind])
        items = sorted((prefix + i.encode(), blob) for i, blob in zip(update.ids, update.blobs, strict=True))
        for key, blob in items:
            if blob:
                txn.put(key, blob)
            else:
                txn.delete(key)
    for o in step.offsets:
        txn.put(_offset_key(generation, o.topic, o.partition), o.next.to_bytes(8, "little"))
    at = _prefix(generation, b"t")
    stored = int.from_bytes(txn.get(at) or b"", "little")
    if step.max_event_time_us > stored:
        txn.put(at, step.max_event_time_us.to_bytes(8, "little"))


def _prefix(generation: int, letter: bytes) -> bytes:
    return struct.pack(">H", generation) + letter


def _offset_key(generation: int, topic: str, partition: int) -> bytes:
    return _prefix(generation, b"o") + topic.encode() + b"\0" + partition.to_bytes(2, "big")


def _drop(txn: lmdb.Transaction, generation: int) -> None:
    prefix = struct.pack(">H", generation)
    with txn.cursor() as cursor:
        found = cursor.set_range(prefix)
        while found and bytes(cursor.key()).startswith(prefix):
            found = cursor.delete() and bool(cursor.key())


def _writer_lock(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / _WRITER_LOCK, "a+", encoding="utf-8")  # noqa: SIM115  held until close
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise Conflict(
            f"feature store {folder}",
            came=f"a second writer (process {holder or 'unknown'} holds the lock)",
            expected="one writer",
            fix="Stop that `double11 ingest` (or `serve`, which runs one), or write to another store.",
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
