"""The archive's writer: each step of the job goes to the journal, and from there, many steps at once, to the day files.

A step is durable in the journal before the store's offset moves. Nothing is ever taken back: offsets that the archive
has already are skipped when the log is read again (see coverage.py), and so a store that was rebuilt or has lost its
last second does not disturb it, nor does a worker that has lost a partition and does not know yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import EventBatch, EventKind, Overloaded, Unavailable, VersionMismatch, logging
from streaming.archive.coverage import Coverage, covered, locked, save, tidying
from streaming.archive.files import EVENTS, ITEMS, SHOWN, Span, Writes, drop_unfinished, tables
from streaming.archive.items import seen
from streaming.archive.journal import Journal, Segment, chained, delete_passed, joined, rows_of
from streaming.archive.tidy import Tidy
from streaming.archive.tombstones import effective, without
from streaming.config import ArchiveConfig

_log = logging.get_logger(__name__)
_CHUNKS_MAX = 64
WAITING = (
    "event_id", "user_id", "item_id", "event_type", "event_time", "request_id", "position", "propensity", "stress",
    "source", "offset",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """What a step read of one partition: offsets [first, next), and the N events of it that are kept, with the offset
    [N] of each. prefix tells the topic: "" events, "i" impressions, "c" catalog. append_us: when the log took the last.
    """

    prefix: str
    partition: int
    first: int
    next: int
    batch: EventBatch
    offset: npt.NDArray[np.int64]
    append_us: int

    @property
    def source(self) -> str:
        """Name in files."""
        return f"{self.prefix}{self.partition}"


class Follower(Protocol):
    """Works on what an archive has taken, partition by partition of `events` (see `streaming.sampler`)."""

    def take(self, partitions: Sequence[int]) -> None:
        """These partitions' sources are ours from now on, or once more."""
        ...

    def leave(self, partitions: Sequence[int]) -> None:
        """These are somebody else's."""
        ...

    def took(self, parts: Sequence[Part]) -> None:
        """A step is in the journal."""
        ...

    def run(self) -> bool:
        """Do a bounded bit of what is due; whether there was anything."""
        ...


class Archive:
    """Writes the sources that it has taken; other processes may write others to the same directory."""

    def __init__(
        self,
        root: Path,
        source: str,
        config: ArchiveConfig | None = None,
        *,
        offline: Path | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """source: the log's URL, for dataset.json. offline: the offline store, which forgets with the archive."""
        self.root, self.source, self._config = root, source, config or ArchiveConfig()
        self._monotonic_s = monotonic_s
        root.mkdir(parents=True, exist_ok=True)
        self._coverage: dict[str, Coverage] = {}
        self._ends: dict[str, int] = {}  # next offset to take, the journal included
        self._journal = Journal(root, time.time_ns() // 1_000)
        self._flushed_s = monotonic_s()
        self._waiting: dict[str, list[pl.DataFrame]] = {}
        self._forgets: list[pl.DataFrame] = []
        self._follower: Follower | None = None
        self._tidy = Tidy(root, self._config, offline)
        self._threads = ThreadPoolExecutor(1, "archive-tidy")
        self._tidying: Future[dict[str, dict[str, int]]] | None = None

    def take(self, log_id: str, stored: Mapping[tuple[str, str], Mapping[int, int]]) -> None:
        """Begin to write partitions from the offsets stored on, by (prefix, topic); with what earlier writers left.

        Raises: VersionMismatch when the archive is of another log or topic; Overloaded, Unavailable; CorruptData.
        """
        self._write_dataset(log_id)
        self.flush()
        left = self._journal.others()
        mine = [f"{prefix}{p}" for (prefix, _), offsets in stored.items() for p in offsets]
        with locked(self.root, mine) as known:  # after the journal: what somebody has flushed since is in here
            drop_unfinished(self.root, {s: known[s].end if s in known else 0 for s in mine})
        for (prefix, topic), offsets in stored.items():
            for partition, offset in offsets.items():
                source = f"{prefix}{partition}"
                coverage = known.get(source, Coverage(topic=topic, partition=partition))
                if coverage.topic != topic:
                    raise self._other("topic", topic, coverage.topic)
                end, rows = chained(left.values(), source, coverage.end, offset)
                if end < offset:
                    _log.warning("archive_hole", topic=topic, partition=partition, first=end, last=offset - 1)
                if end > coverage.end:
                    self._journal.segments.append(Segment({source: (coverage.end, end)}, joined(rows)))
                self._coverage[source], self._ends[source] = coverage, max(end, offset)
        self.flush()
        delete_passed(left, {s: c.end for s, c in covered(self.root).items()})
        if self._follower is not None:
            self._follower.take([p for (prefix, _), offsets in stored.items() if prefix == EVENTS for p in offsets])

    def followed_by(self, follower: Follower) -> None:
        """Hand everything that is taken to a follower, once it is durable; call it before `take`."""
        self._follower = follower

    def leave(self, sources: Sequence[str]) -> None:
        """Stop writing some sources: another process takes them, and tidies their files."""
        self.flush()
        self._end_tidying()
        for source in sources:
            self._coverage.pop(source, None)
            self._ends.pop(source, None)
        if self._follower is not None:
            self._follower.leave([int(s) for s in sources if s.isdigit()])

    def waiting(self, sources: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame | None]:
        """What is in no day file yet: actions (columns WAITING, times in microseconds), and rows of `forgotten`."""
        for source in sources:
            if len(self._waiting.get(source, ())) > _CHUNKS_MAX:
                self._waiting[source] = [pl.concat(self._waiting[source], rechunk=True)]
        frames = [f for source in sources for f in self._waiting.get(source, ())]
        actions = pl.concat([_frame(joined([]).select(WAITING)), *frames])
        return actions, pl.concat(self._forgets) if self._forgets else None

    def _await(self, source: str, table: pa.Table) -> None:
        """Keep rows of the journal for `waiting`."""
        kind = table.column("kind")
        actions = table.filter(pc.equal(kind, int(EventKind.ACTION)))
        if actions.num_rows:
            self._waiting.setdefault(source, []).append(_frame(actions.select(WAITING)))
        forgets = table.filter(pc.equal(kind, int(EventKind.FORGET)))
        if forgets.num_rows:
            self._forgets.append(tables(_frame(forgets))["forgotten"])

    def end(self, source: str) -> int:
        """Next offset to take."""
        return self._ends[source]

    def write(self, parts: Sequence[Part]) -> None:
        """Take a step; durable on return. What an earlier step brought is flushed first when there is enough of it.

        Raises: Overloaded for a full disk; Unavailable.
        """
        if self._journal.num_rows >= self._config.flush_rows_max or self._is_old():
            self.flush()
        self._tidy_up()
        new = [p for p in (self._not_yet(part) for part in parts) if p is not None]
        if new:
            # A forget event takes with it what had arrived before it: of its user's slates, up to here.
            shown = {p.source: self._ends.get(f"{SHOWN}{p.partition}", 0) if p.prefix == EVENTS else 0 for p in new}
            rows = [rows_of(p.batch.table, p.source, p.offset, shown[p.source]) for p in new]
            self._journal.append(Segment({p.source: (p.first, p.next) for p in new}, joined(rows)))
            for part, table in zip(new, rows, strict=True):
                self._ends[part.source] = part.next
                if self._follower is not None:
                    self._await(part.source, table)
            if self._follower is not None:
                self._follower.took(new)
        if self._follower is not None:
            self._follower.run()

    def _not_yet(self, part: Part) -> Part | None:
        """What of a part is not in the archive."""
        first = max(part.first, self._ends[part.source])
        if part.next <= first:
            return None
        new = part.offset >= first
        batch = part.batch if new.all() else part.batch.filter(new)
        return replace(part, first=first, batch=batch, offset=part.offset[new])

    def flush(self) -> None:
        """Move the journal into the day files: all of them durable, then the coverage, then the journal goes.

        Raises: Overloaded for a full disk, Unavailable; the journal stays.
        """
        self._flushed_s = self._monotonic_s()
        if not self._journal.segments:
            return
        ranges: dict[str, tuple[int, int]] = {}
        for segment in self._journal.segments:
            for source, (first, end) in segment.ranges.items():
                ranges[source] = (ranges.get(source, (first, end))[0], end)
        rows = _frame(joined([s.rows for s in self._journal.segments]))
        with locked(self.root, ranges) as known:
            self._write_days(rows, ranges, {source: known.get(source, self._coverage[source]) for source in ranges})
        self._journal.clear()
        self._waiting.clear()
        self._forgets.clear()

    def _write_days(
        self, rows: pl.DataFrame, ranges: Mapping[str, tuple[int, int]], known: Mapping[str, Coverage]
    ) -> None:
        """Write rows of the journal, by source of offsets [first, end), but for those that `known` has: another worker
        has taken the source over, or had lost it and was late.
        """
        ranges = {s: (max(first, known[s].end), end) for s, (first, end) in ranges.items() if end > known[s].end}
        firsts = {source: first for source, (first, _) in ranges.items()}
        begin = pl.col("source").replace_strict(firsts, default=None, return_dtype=pl.Int64)
        by_folder, writes = tables(rows.filter(pl.col("offset") >= begin)), Writes()
        if "forgotten" in by_folder:
            stones = effective([by_folder["forgotten"]])
            by_folder |= {"events": without(by_folder["events"], stones)} if "events" in by_folder else {}
        for folder, rows in by_folder.items():
            day = pl.col("event_time").dt.strftime("%Y-%m-%d").alias("day")
            for (at, source), some in rows.group_by(day, "source", maintain_order=True):
                first, end = ranges[str(source)]
                path = self.root / folder / f"day={at}" / Span(str(source), first, end - 1).file_name
                writes.parquet(path, some.drop("source"))
        for source, items in seen(by_folder):
            first, end = ranges[source]
            writes.parquet(self.root / ITEMS / Span(source, first, end - 1).file_name, items)
        writes.commit()
        new = {s: replace(known[s], ranges=known[s].having(first, end)) for s, (first, end) in ranges.items()}
        for source, coverage in new.items():
            save(writes, self.root, source, coverage)
        writes.commit()
        self._coverage |= {**known, **new}

    def idle(self) -> None:
        """Work that can wait: flush what has waited long enough, a bounded bit of tidying, and the follower's."""
        if self._is_old():
            self.flush()
        self._tidy_up()
        if self._follower is not None:
            self._follower.run()

    def purge(self) -> None:
        """Erase all rows behind tombstones now, instead of bit by bit."""
        self.flush()
        self._end_tidying()
        with tidying(self.root, self._coverage) as free:
            applied = self._tidy.purge(free, files_max=None)
        self._applied(applied)

    def _tidy_up(self) -> None:
        """Let a thread do a bounded bit of tidying: a step must not wait for a merge."""
        if self._tidying is not None and self._tidying.done():
            self._end_tidying()
        if self._tidying is None:
            self._tidying = self._threads.submit(self._tidy.some, dict(self._coverage))

    def _end_tidying(self) -> None:
        """Wait for the bit under way, if there is one."""
        if self._tidying is not None:
            tidying, self._tidying = self._tidying, None
            try:
                self._applied(tidying.result())
            except (
                Overloaded,
                Unavailable,
            ) as error:  # a merge may need more room than steps, which do not wait for it
                _log.warning("archive_tidying_refused", cause=str(error))

    def _applied(self, purged: Mapping[str, Mapping[str, int]]) -> None:
        """Note which tombstones have been applied to the files of our sources."""
        mine, writes = {s: c for s, c in self._coverage.items() if s in purged}, Writes()
        with locked(self.root, mine) as known:
            for source, coverage in mine.items():
                if known.get(source, coverage) == coverage:  # else somebody else was at its files: another round
                    self._coverage[source] = replace(coverage, purged=purged[source])
                    save(writes, self.root, source, self._coverage[source])
            writes.commit()

    def _is_old(self) -> bool:
        return bool(self._journal.segments) and self._monotonic_s() - self._flushed_s >= self._config.flush_s

    def _write_dataset(self, log_id: str) -> None:
        """dataset.json names the log: offsets mean nothing without it."""
        path = self.root / "dataset.json"
        if path.is_file() and (known := json.loads(path.read_text("utf-8"))).get("log") != log_id:
            raise self._other("log", log_id, known.get("log"))
        if not path.is_file():
            document = {"format_version": 1, "format": "archive", "source": self.source, "log": log_id}
            writes = Writes()
            writes.text(path, json.dumps(document | {"static_catalogue": False}, indent=1) + "\n")
            writes.commit()

    def _other(self, what: str, came: str, expected: object) -> VersionMismatch:
        return VersionMismatch(
            f"archive {self.root}",
            came=f"{what} {came}",
            expected=f"{expected}, of which it is",
            fix="Give every log an archive directory of its own.",
        )


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
