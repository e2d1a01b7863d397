"""The archive's writer: each step of the job goes to the journal, and from there, many steps at once, to the day files.

A step is durable in the journal before the store's offset moves. Nothing is ever taken back: offsets that the archive
has already are skipped when the log is read again (see coverage.py), and so a store that was rebuilt or has lost its
last second does not disturb it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.core import EventBatch, VersionMismatch, logging
from streaming.archive.coverage import Coverage, covered, save
from streaming.archive.files import EVENTS, SHOWN, Span, Writes, tables
from streaming.archive.items import Items
from streaming.archive.journal import Journal, Segment, chained, joined, rows_of
from streaming.archive.tidy import Tidy
from streaming.archive.tombstones import effective, without
from streaming.config import ArchiveConfig

_log = logging.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """What a step read of one partition: offsets [first, next), and the N events of it that are kept, with the offset
    [N] of each. prefix tells the topic: "" events, "i" impressions, "c" catalog.
    """

    prefix: str
    partition: int
    first: int
    next: int
    batch: EventBatch
    offset: npt.NDArray[np.int64]

    @property
    def source(self) -> str:
        """Name in files."""
        return f"{self.prefix}{self.partition}"


class Archive:
    """Writes the sources that it has taken; other processes may write others to the same directory."""

    def __init__(
        self,
        root: Path,
        source: str,
        config: ArchiveConfig | None = None,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """source: the log's URL, for dataset.json."""
        self.root, self.source, self._config = root, source, config or ArchiveConfig()
        self._monotonic_s = monotonic_s
        root.mkdir(parents=True, exist_ok=True)
        self._coverage: dict[str, Coverage] = {}
        self._ends: dict[str, int] = {}  # next offset to take, the journal included
        self._journal = Journal(root, time.time_ns() // 1_000)
        self._flushed_s = monotonic_s()
        self._items = Items(root)
        self._tidy = Tidy(root, self._config)

    def take(self, log_id: str, stored: Mapping[tuple[str, str], Mapping[int, int]]) -> None:
        """Begin to write partitions from the offsets stored on, by (prefix, topic); with what earlier writers left.

        Raises: VersionMismatch when the archive is of another log or topic; CorruptData.
        """
        self._write_dataset(log_id)
        self.flush()
        known = covered(self.root)
        segments = self._journal.left({s: c.end for s, c in known.items()})
        for (prefix, topic), offsets in stored.items():
            for partition, offset in offsets.items():
                source = f"{prefix}{partition}"
                coverage = known.get(source, Coverage(topic=topic, partition=partition))
                if coverage.topic != topic:
                    raise self._other("topic", topic, coverage.topic)
                end, found = chained(segments, source, coverage.end, offset)
                if end < offset:
                    _log.warning("archive_hole", topic=topic, partition=partition, first=end, last=offset - 1)
                if end > coverage.end:
                    self._journal.segments.append(Segment({source: (coverage.end, end)}, joined(found)))
                self._coverage[source], self._ends[source] = coverage, max(end, offset)
        self.flush()
        self._journal.left({s: c.end for s, c in covered(self.root).items()})

    def leave(self, sources: Sequence[str]) -> None:
        """Stop writing some sources: another process takes them."""
        self.flush()
        for source in sources:
            del self._coverage[source], self._ends[source]

    def end(self, source: str) -> int:
        """Next offset to take."""
        return self._ends[source]

    def write(self, parts: Sequence[Part]) -> None:
        """Take a step; durable on return. What an earlier step brought is flushed first when there is enough of it."""
        if self._journal.num_rows >= self._config.flush_rows_max or self._is_old():
            self.flush()
        ranges, rows = {}, []
        for part in parts:
            first = max(part.first, self._ends[part.source])
            if part.next <= first:
                continue
            new = part.offset >= first
            batch = part.batch if new.all() else part.batch.filter(new)
            shown_before = self._ends.get(f"{SHOWN}{part.partition}", 0) if part.prefix == EVENTS else 0
            rows.append(rows_of(batch.table, part.source, part.offset[new], shown_before))
            ranges[part.source] = (first, part.next)
        if not ranges:
            return
        self._journal.append(Segment(ranges, joined(rows)))
        self._ends |= {source: end for source, (_, end) in ranges.items()}

    def flush(self) -> None:
        """Move the journal into the day files: all of them durable, then the coverage, then the journal goes."""
        self._flushed_s = self._monotonic_s()
        if not self._journal.segments:
            return
        ranges: dict[str, tuple[int, int]] = {}
        for segment in self._journal.segments:
            for source, (first, end) in segment.ranges.items():
                ranges[source] = (ranges.get(source, (first, end))[0], end)
        frame, writes = pl.from_arrow(joined([s.rows for s in self._journal.segments])), Writes()
        assert isinstance(frame, pl.DataFrame)
        by_folder = tables(frame)
        if "forgotten" in by_folder:
            stones = effective([by_folder["forgotten"]])
            by_folder |= {"events": without(by_folder["events"], stones)} if "events" in by_folder else {}
        for folder, rows in by_folder.items():
            day = pl.col("event_time").dt.strftime("%Y-%m-%d").alias("day")
            for (at, source), some in rows.group_by(day, "source", maintain_order=True):
                first, end = ranges[str(source)]
                path = self.root / folder / f"day={at}" / Span(str(source), first, end - 1).file_name
                writes.parquet(path, some.drop("source"))
        writes.commit()
        for source, (first, end) in ranges.items():
            known = self._coverage[source]
            self._coverage[source] = replace(known, ranges=known.having(first, end))
            save(writes, self.root, source, self._coverage[source])
        writes.commit()
        self._journal.clear()
        self._items.add(by_folder)

    def idle(self) -> None:
        """Work that can wait: flush what has waited long enough, one bounded bit of tidying."""
        if self._is_old():
            self.flush()
        self._coverage |= self._tidy.some(self._coverage)

    def finish(self) -> None:
        """Flush, erase what is to be forgotten, and write items.parquet."""
        self.flush()
        self._coverage |= self._tidy.purge(self._coverage)
        self._items.write()

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
