"""LMDB environments: one per folder and process, however many users it has inside the process.

LMDB must not be opened twice by one process, and does not survive a fork: the table below is keyed by process id.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from recsys.core.errors import BadInput, Conflict, CorruptData, Overloaded

READERS_MAX = 1024
_lock = threading.Lock()
_open: dict[tuple[int, Path], tuple[lmdb.Environment, int]] = {}


def acquire(folder: Path, map_bytes_max: int, *, sequential: bool = False) -> lmdb.Environment:
    """Open a folder's environment, or share the one this process has; pair with `release`.

    map_bytes_max bounds the file; it is address space, not memory or disk, until used. Commits are fsynced.
    sequential: read from one end to the other, so that the system does well to read ahead.
    Raises: CorruptData when the folder holds something else than a whole LMDB file; Overloaded for a full disk;
    Conflict when a process of another container has it open under this one's process id; BadInput for files that this
    user may not write, or a read-only disk.
    """
    folder = folder.resolve()
    with _lock:
        env, users = _open.get((os.getpid(), folder), (None, 0))
        if env is None:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                env = lmdb.open(str(folder), map_size=map_bytes_max, max_readers=READERS_MAX, readahead=sequential)
                env.reader_check()
            except lmdb.LockError as error:  # readers lock the byte of their process id, and find this one taken
                raise Conflict(
                    f"embedded store {folder}",
                    came=f"{error}: another process {os.getpid()} has it open",
                    expected="processes of one host that see each other (one PID namespace)",
                    fix="The store is whole. Run all its processes in one container, or use Kafka and Redis.",
                ) from error
            except lmdb.Error as error:
                if _is_not_to_be_written(error):
                    raise _not_to_be_written(folder, error) from error
                if _is_out_of_room(error):
                    raise _full(str(folder), error) from error
                raise CorruptData(
                    f"embedded store {folder}",
                    came=str(error),
                    expected="a whole LMDB environment",
                    fix="Move the folder away and rebuild it: refold the log, or copy a backup made by mdb_copy.",
                ) from error
        _open[os.getpid(), folder] = (env, users + 1)
        return env


def release(folder: Path) -> None:
    """Give back what `acquire` gave; the last user closes the file."""
    at = (os.getpid(), folder.resolve())
    with _lock:
        env, users = _open.pop(at)
        if users > 1:
            _open[at] = (env, users - 1)
        else:
            env.close()


@contextmanager
def writing(env: lmdb.Environment) -> Iterator[lmdb.Transaction]:
    """A write transaction, undone by whatever is raised inside.

    Raises: Overloaded when the file is at map_bytes_max, or the disk is full.
    """
    try:
        with env.begin(write=True) as txn:
            yield txn
    except lmdb.Error as error:
        if _is_out_of_room(error):
            raise _full(env.path(), error) from error
        raise


def _is_not_to_be_written(error: lmdb.Error) -> bool:
    # EACCES has a type of its own, EROFS only the system's words.
    return isinstance(error, lmdb.ReadonlyError) or os.strerror(errno.EROFS) in str(error)


def _not_to_be_written(folder: Path, error: lmdb.Error) -> BadInput:
    return BadInput(
        f"embedded store {folder}",
        came=f"{error}: files that user {os.geteuid()} may not write",
        expected="a folder of the user that runs double11, on a disk that can be written",
        fix=f"The store is whole. As root: chown -R {os.geteuid()} {folder}; or mount it to be written.",
    )


def _is_out_of_room(error: lmdb.Error) -> bool:
    # What the system answers is a plain Error but for ENOSPC: EIO where a full disk cut a write short, EFBIG, EDQUOT.
    return type(error) is lmdb.Error or isinstance(error, lmdb.MapFullError | lmdb.DiskError)


def _full(folder: str, error: lmdb.Error) -> Overloaded:
    return Overloaded(
        f"embedded store {folder}",
        came=str(error),
        expected="room below map_bytes_max and on the disk",
        fix="Free disk, or raise map_bytes_max in double11.toml ([streaming.embedded], [feature_store.embedded]).",
    )
