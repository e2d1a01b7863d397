"""What online training has done, on disk: a folder of commits, each one whole or absent.

    STATE/commit-00000007.safetensors   changed rows, dense weights, optimizer, samples seen, offsets after it

A commit holds values, not differences, so that reading it twice does no harm. Every so often one holds everything that
changed since the run, and the ones before it go. The delta of a commit is read out of it, never made anew: whoever
restarts between a commit and its publication publishes the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recsys.core import Conflict, CorruptData, VersionMismatch, disk

Arrays = dict[str, npt.NDArray[Any]]
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """One step of the trainer. number: 1, 2, 3, ...; sequence: of the last delta, this commit's if it has rows.

    offsets: next sample per partition. deltas_from: offset of the deltas topic before this delta was published.
    whole: holds everything since the run. samples_until_us: newest sample so far, microseconds UTC.
    """

    run_id: str
    number: int
    sequence: int
    offsets: Mapping[str, int]
    deltas_from: int
    samples_until_us: int
    whole: bool
    rng: Mapping[str, Any]


class Journal:
    """The commits of one trainer. The folder is locked for as long as this is open; the lock dies with its process."""

    def __init__(self, folder: Path, run_id: str) -> None:
        """Raises: Conflict when another trainer has the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._run_id = folder, run_id
        self._lock = _locked(folder / "lock")

    def read(self) -> Iterator[tuple[Commit, Arrays]]:
        """The commits to apply on the run, in order: from the newest whole one on.

        Raises: CorruptData for one that does not parse or is missing; VersionMismatch for those of another run.
        """
        read = [(self._read(p)) for p in self._paths()]
        start = max((i for i, (commit, _) in enumerate(read) if commit.whole), default=0)
        numbers = [commit.number for commit, _ in read[start:]]
        first = numbers[0] if numbers and read[start][0].whole else 1
        if numbers != list(range(first, first + len(numbers))):
            raise CorruptData(
                f"state {self.folder}", came=f"commits {numbers}", expected="one after the other from a whole one or 1",
                fix="Restore the folder from a copy, or train a new run and start from it.",
            )  # fmt: skip
        yield from read[start:]

    def write(self, commit: Commit, arrays: Arrays) -> None:
        """Make a commit durable; after a whole one the ones before it go."""
        final = self.folder / f"commit-{commit.number:08d}.safetensors"
        temporary = final.with_suffix(".tmp")
        facts = {"commit": json.dumps({"format": _FORMAT, **asdict(commit)})}
        with disk.writing(temporary):
            save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, temporary, metadata=facts)
        _fsync(temporary)
        temporary.rename(final)
        _fsync(self.folder)
        if commit.whole:
            for older in self._paths():
                if older < final:
                    older.unlink()

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("commit-*.safetensors"))

    def _read(self, path: Path) -> tuple[Commit, Arrays]:
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads(file.metadata()["commit"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            if facts.pop("format") != _FORMAT:
                raise ValueError("format of another release")
            commit = Commit(**facts)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptData(
                f"state file {path}", came=f"{error!r:.200}", expected="a commit of online training",
                fix="Restore the folder from a copy, or train a new run and start from it.",
            ) from error  # fmt: skip
        if commit.run_id != self._run_id:
            raise VersionMismatch(
                f"state {self.folder}", came=f"that of run {commit.run_id}", expected=f"run {self._run_id}",
                fix="Pass the run it was made for, or another --state.",
            )  # fmt: skip
        return commit, arrays


def _locked(path: Path) -> IO[str]:
    lock = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise Conflict(
            f"state {path.parent}", came="another trainer that holds its lock", expected="one trainer of a run",
            fix="Stop the other one, or pass another --run.",
        ) from error  # fmt: skip
    return lock


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
