"""Coverage: which offsets of a source the archive has, also where they left no row.

A duplicate, a dead letter or a marked event of a stress test leaves nothing in the files, so their names alone cannot
tell a hole from such a stretch. `coverage/SOURCE.json` is written after all files of its offsets are durable: what it
does not list does not count. Offsets only ever go forward: what is covered is not written a second time when the log is
read again from further back (a Redis that lost its last second, a rebuild), since it would be classified the same.

A worker that has lost a source may not know yet, and still flush. So whoever writes a source holds its lock,
`coverage/SOURCE.lock`, and goes by the coverage on disk: what another has written is neither written again nor taken
back. Whoever tidies its files holds `coverage/SOURCE.tidy`: a merge may take long, and no flush waits for it.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from recsys.core import CorruptData, Unavailable, VersionMismatch
from streaming.archive.files import Writes, make_folder, writing

_LOCK_WAIT_S_MAX = 5.0  # a flush takes less; whoever hangs in one must not hang the others
_LOCK_ASK_S = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """Of one source: topic and partition; ranges: offsets [first, next), ascending; purged: by source of tombstones,
    the offset below which they have been applied to this source's files.
    """

    topic: str
    partition: int
    ranges: tuple[tuple[int, int], ...] = ()
    purged: Mapping[str, int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Next offset to archive."""
        return self.ranges[-1][1] if self.ranges else 0

    def having(self, first: int, end: int) -> tuple[tuple[int, int], ...]:
        """The ranges with [first, end) added behind them."""
        if self.ranges and self.ranges[-1][1] == first:
            return (*self.ranges[:-1], (self.ranges[-1][0], end))
        return (*self.ranges, (first, end))

    def check_whole(self, what: str) -> None:
        """Raises: VersionMismatch naming the first hole between offset 0 and `end`."""
        at = 0
        for first, end in self.ranges:
            if first > at:
                raise VersionMismatch(
                    f"{what}, {self.topic}, partition {self.partition}",
                    came=f"no offsets {at} to {first - 1}: the job ran without this archive then",
                    expected=f"every offset up to {self.end - 1}",
                    fix="Rebuild from an archive that is whole, or let ingest read the log from its start.",
                )
            at = end


def covered(root: Path) -> dict[str, Coverage]:
    """Coverage of every source. Raises: CorruptData."""
    return {path.stem: _read(path) for path in sorted((root / "coverage").glob("*.json"))}


@contextmanager
def locked(root: Path, sources: Iterable[str]) -> Iterator[dict[str, Coverage]]:
    """Coverage of those of some sources that have one, which nobody else changes inside.

    Raises: Unavailable while another worker writes one of them; Overloaded for a full disk; CorruptData.
    """
    with ExitStack() as held:
        until_s = time.monotonic() + _LOCK_WAIT_S_MAX
        paths = [root / "coverage" / f"{source}.json" for source in sorted(sources)]
        for path in paths:  # in one order, so that no two wait for each other
            held.enter_context(_lock(path.with_suffix(".lock"), until_s))
        yield {path.stem: _read(path) for path in paths if path.is_file()}


@contextmanager
def tidying(root: Path, mine: Mapping[str, Coverage]) -> Iterator[dict[str, Coverage]]:
    """Those of some sources whose files nobody else tidies now, nor inside. Raises: Overloaded for a full disk."""
    with ExitStack() as held:
        free = {}
        for source, coverage in mine.items():
            with suppress(Unavailable):
                held.enter_context(_lock(root / "coverage" / f"{source}.tidy", until_s=0))
                free[source] = coverage
        yield free


def save(writes: Writes, root: Path, source: str, coverage: Coverage) -> None:
    """Write one source's coverage with the next commit of `writes`."""
    document = {
        "topic": coverage.topic,
        "partition": coverage.partition,
        "ranges": [list(r) for r in coverage.ranges],
        "purged": dict(coverage.purged),
    }
    writes.text(root / "coverage" / f"{source}.json", json.dumps(document) + "\n")


def _lock(path: Path, until_s: float) -> IO[str]:
    """A lock that ends with its file, or its process."""
    with writing(path):
        make_folder(path.parent)
        lock = path.open("a", encoding="utf-8")
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError as error:
            if time.monotonic() >= until_s:
                lock.close()
                raise Unavailable(
                    f"archive {path.parent.parent}",
                    came=f"another worker that writes source {path.stem}",
                    expected=f"its lock within {_LOCK_WAIT_S_MAX:g} s",
                    fix="The job asks again; if it stays so, end the worker that hangs.",
                ) from error
        time.sleep(_LOCK_ASK_S)


def _read(path: Path) -> Coverage:
    try:
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        ranges = tuple((int(first), int(end)) for first, end in document["ranges"])
        return Coverage(
            topic=document["topic"], partition=int(document["partition"]), ranges=ranges, purged=document["purged"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptData(
            str(path), came=f"{type(error).__name__}: {error}", expected="topic, ranges", fix="Copy the archive again."
        ) from error
