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
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import lmdb

from feature_store.base import ItemFeatures, UserFeatures
from feature_store.commit import Commit, EntryKind, other_log
from feature_store.config import EmbeddedStoreConfig
from feature_store.read import item_features, user_features
from feature_store.views import VIEW_SET
from recsys.core import Conflict, CorruptData, Deadline, VersionMismatch, embedded

_META = b"\0\0meta"
_SHADOW = 1 << 15  # generation bit of the stress test's namespace
_LETTER: Mapping[EntryKind, bytes] = {"user": b"u", "item": b"i", "seen": b"s", "shown": b"w"}
_KEY_BYTES_MAX = 500
_WRITER_LOCK = "writer.lock"
_REBUILD_LOCK = "rebuild.lock"
_DROP_KEYS_PER_STEP = 50_000


class EmbeddedReader:
    """A FeatureReader in any process. Opening an empty folder makes an empty store."""

    def __init__(self, path: Path, config: EmbeddedStoreConfig | None = None) -> None:
        """path: the folder of the `embedded:` URL.

        Raises: CorruptData for a broken store; VersionMismatch for one of another view set.
        """
        self.path = path / "store"
        self._env = embedded.acquire(self.path, (config or EmbeddedStoreConfig()).map_bytes_max)
        with embedded.writing(self._env) as txn:
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

    def rebuild(self) -> Rebuild:
        """A new, empty generation beside the live one; readers see it after `Rebuild.switch`. Raises: Conflict."""
        return Rebuild(self.path, self._env)

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
        fix = "Stop that `double11 ingest` (or `serve`, which runs one), or write to another store."
        self._lock = _held_lock(path / "store", _WRITER_LOCK, "a second writer", fix)
        self._generation: int | None = None  # the one that this writer has read offsets of
        try:
            super().__init__(path, config)
        except BaseException:
            self._lock.close()
            raise

    def offsets(self, topic: str) -> Mapping[int, int]:
        """Next offset to read, by partition."""
        found = {}
        with self._env.begin() as txn, txn.cursor() as cursor:
            self._generation = self._meta(txn)["generation"]
            prefix = self._prefix(txn, b"o") + topic.encode() + b"\0"
            if cursor.set_range(prefix):
                for key, value in cursor.iternext():
                    if not bytes(key).startswith(prefix):
                        break
                    found[int.from_bytes(key[len(prefix) :], "big")] = int.from_bytes(value, "little")
        return found

    def commit(self, step: Commit) -> None:
        """Take the whole step in one fsynced transaction. Raises: Conflict, Overloaded."""
        with embedded.writing(self._env) as txn:
            generation = self._meta(txn)["generation"]
            self._check_generation(generation)
            self._check_offsets(txn, generation, step)
            write(txn, generation, step)

    def close(self) -> None:
        """Let go of the environment and of the lock."""
        super().close()
        self._lock.close()

    def bind(self, log_id: str) -> None:
        """Say which log the offsets are of. Raises: VersionMismatch."""
        with embedded.writing(self._env) as txn:
            meta = self._meta(txn)
            if meta.setdefault("log", log_id) != log_id:
                raise other_log(f"feature store {self.path}", log_id, meta["log"])
            txn.put(_META, json.dumps(meta).encode())

    def _check_generation(self, generation: int) -> None:
        """A step that was made from what a rebuild has replaced does not fit, even where the offsets do."""
        if self._generation is None:
            self._generation = generation
        if generation != self._generation:
            came, self._generation = self._generation, None
            raise Conflict(
                f"step for {self.path}",
                came=f"made from generation {came}",
                expected=f"from {generation}: the store was rebuilt",
                fix="Start again; the offsets are those that the rebuild covers.",
            )

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
    """Fills a generation that nobody reads yet, then makes it the live one in one write. One at a time."""

    def __init__(self, path: Path, env: lmdb.Environment) -> None:
        self._env = env
        self._lock = _held_lock(path, _REBUILD_LOCK, "a second rebuild", "Let that one finish, or stop it.")
        with env.begin() as txn:
            live = json.loads(bytes(txn.get(_META) or b"{}"))["generation"]
        self._generation = live % (_SHADOW - 1) + 1
        _drop_others(env, live)  # what a rebuild that died has left

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities in the new generation."""
        with self._env.begin() as txn:
            prefix, get = _prefix(self._generation, _LETTER[kind]), txn.get
            return [get(prefix + i.encode(), b"") for i in ids]

    def commit(self, step: Commit) -> None:
        """Write into the new generation."""
        with embedded.writing(self._env) as txn:
            write(txn, self._generation, step)

    def switch(self, log_id: str = "") -> None:
        """Make the new generation live and drop the old one. A writer at work gets a Conflict at its next step."""
        with embedded.writing(self._env) as txn:
            meta = json.loads(bytes(txn.get(_META) or b"{}")) | {"views": VIEW_SET, "generation": self._generation}
            meta.pop("log", None)
            txn.put(_META, json.dumps(meta | ({"log": log_id} if log_id else {})).encode())
        _drop_others(self._env, self._generation)

    def close(self) -> None:
        """Let another rebuild begin; what was not switched to is dropped by it."""
        self._lock.close()


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


def _drop_others(env: lmdb.Environment, live: int) -> None:
    """Delete every generation but one and its shadow, a bounded number of keys at a time: others write meanwhile."""
    keep = sorted(struct.pack(">H", g) for g in (0, live, live | _SHADOW))
    for after, before in pairwise([*keep, b"\xff\xff\xff"]):
        is_left = True
        while is_left:
            with embedded.writing(env) as txn, txn.cursor() as cursor:
                is_left = cursor.set_range(after + b"\xff" * _KEY_BYTES_MAX)
                for _ in range(_DROP_KEYS_PER_STEP):
                    is_left = is_left and bytes(cursor.key()) < before
                    if not is_left:
                        break
                    cursor.delete()
                    is_left = bool(cursor.key())


def _held_lock(folder: Path, name: str, came: str, fix: str) -> IO[str]:
    """A lock that dies with its process. Raises: Conflict when another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / name, "a+", encoding="utf-8")  # noqa: SIM115  held until close
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise Conflict(
            f"feature store {folder}",
            came=f"{came} (process {holder or 'unknown'} holds the lock)",
            expected="one at a time",
            fix=fix,
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
