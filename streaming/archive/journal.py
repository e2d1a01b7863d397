"""The journal: what the archive has taken since its last flush, one Arrow file per step of the job.

A step would else write a Parquet file per partition, day and folder, hundreds a second. Journals are named after when
their writer started, so that of two that have the same offsets the later writer's is taken: the earlier one had lost
the partition and did not know yet.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import EVENT_SCHEMA, CorruptData
from streaming.archive.files import Writes

SCHEMA = pa.schema(
    [
        *EVENT_SCHEMA,
        pa.field("source", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("shown_before", pa.int64()),  # of a forget event: the offset of its user's slates then
    ]
)
_RANGES = b"double11.ranges"


@dataclass(frozen=True, slots=True)
class Segment:
    """One step: by source the offsets [first, next) that it covers, and its rows."""

    ranges: Mapping[str, tuple[int, int]]
    rows: pa.Table

    def of(self, source: str, first: int, end: int) -> pa.Table:
        """Rows of a source with offsets in [first, end)."""
        t = self.rows
        inside = pc.and_(pc.greater_equal(t["offset"], first), pc.less(t["offset"], end))
        return t.filter(pc.and_(pc.equal(t["source"], source), inside))


class Journal:
    """Segments of one writer."""

    def __init__(self, root: Path, started_us: int) -> None:
        self._folder = root / "journal"
        self._name = f"{started_us:016d}-{uuid.uuid4().hex[:8]}"
        self._number = 0
        self.segments: list[Segment] = []

    @property
    def num_rows(self) -> int:
        """Rows that wait for a flush."""
        return sum(s.rows.num_rows for s in self.segments)

    def append(self, segment: Segment) -> None:
        """Durable on return."""
        ranges = json.dumps({s: list(r) for s, r in segment.ranges.items()})
        writes = Writes()
        table = segment.rows.replace_schema_metadata({_RANGES: ranges.encode()})
        writes.arrow(self._folder / f"{self._name}-{self._number:09d}.arrow", table)
        writes.commit()
        self._number += 1
        self.segments.append(segment)

    def clear(self) -> None:
        """Everything is elsewhere now."""
        for path in self._folder.glob(f"{self._name}-*.arrow"):
            path.unlink(missing_ok=True)  # who takes partitions over deletes what has been flushed, too
        self.segments.clear()

    def others(self) -> dict[Path, Segment]:
        """Segments of other writers, dead or at work, the latest writer's first. Raises: CorruptData."""
        segments = {}
        for path in sorted(self._folder.glob("*.arrow"), reverse=True):
            if not path.name.startswith(self._name):
                with suppress(FileNotFoundError):  # its writer, at work, has flushed it meanwhile
                    segments[path] = _read(path)
        return segments


def delete_passed(segments: Mapping[Path, Segment], ends: Mapping[str, int]) -> None:
    """Delete the segments that `ends` (of all sources) has gone past."""
    for path, segment in segments.items():
        if all(end <= ends.get(source, 0) for source, (_, end) in segment.ranges.items()):
            path.unlink(missing_ok=True)


def chained(segments: Iterable[Segment], source: str, at: int, upto: int) -> tuple[int, list[pa.Table]]:
    """Rows of a source from offset `at` on without a gap, at most up to `upto`: how far they go, and they."""
    tables: list[pa.Table] = []
    while at < upto:
        ranges = ((s, *s.ranges.get(source, (0, 0))) for s in segments)
        fitting = next(((s, end) for s, first, end in ranges if first <= at < end), None)
        if fitting is None:
            break
        segment, end = fitting[0], min(fitting[1], upto)
        tables.append(segment.of(source, at, end))
        at = end
    return at, tables


def rows_of(batch: pa.Table, source: str, offset: npt.NDArray[np.int64], shown_before: int) -> pa.Table:
    """EVENT_SCHEMA rows of one source as rows of the journal."""
    n = batch.num_rows
    columns = [pa.repeat(pa.scalar(source, pa.string()), n), pa.array(offset, pa.int64())]
    columns.append(pa.repeat(pa.scalar(shown_before, pa.int64()), n))
    return pa.table([*batch.columns, *columns], schema=SCHEMA)


def joined(tables: Iterable[pa.Table]) -> pa.Table:
    """Rows of the journal one after the other."""
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def _read(path: Path) -> Segment:
    try:
        with pa.OSFile(str(path), "rb") as source:
            table = pa.ipc.open_file(source).read_all()
        ranges = json.loads((table.schema.metadata or {})[_RANGES])
        return Segment({s: (int(a), int(b)) for s, (a, b) in ranges.items()}, table.replace_schema_metadata(None))
    except (pa.ArrowInvalid, ValueError, KeyError) as error:
        raise CorruptData(
            str(path),
            came=f"{type(error).__name__}: {error}",
            expected="a segment of the archive's journal",
            fix="Move it away; the rebuild will name the offsets that are missing then.",
        ) from error
