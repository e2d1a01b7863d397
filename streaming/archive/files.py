"""Files of an archive: their names, their columns, and writing many of them durably at once.

    events/day=YYYY-MM-DD/SOURCE-FIRST-LAST.parquet    accepted actions and impressions, late ones marked
    catalog/day=.../                                   listings, prices, stock
    changes/day=.../                                   item changes with texts
    items/SOURCE-FIRST-LAST.parquet                    items of the events and changes, as first known: see items.py
    forgotten/day=.../                                 who asked to be forgotten, and up to where: tombstones
    coverage/SOURCE.json, journal/                     see coverage.py, writer.py

SOURCE is a partition with the prefix of its topic: "" events, "i" impressions, "c" catalog. FIRST and LAST are offsets:
the file has all of its day's rows in between. A file whose range is inside another's of its day and source has been
merged into that one and is about to be deleted.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core import EventKind, EventType, Overloaded

EVENTS, SHOWN, CATALOG = "", "i", "c"  # prefixes
ITEMS = "items"  # the one folder that has no days
DAILY = ("events", "catalog", "changes", "forgotten")
COLUMNS: Mapping[str, Sequence[str]] = {
    "events": (
        "event_id", "user_id", "item_id", "event_type", "event_time", "session_id", "request_id", "position",
        "propensity", "price", "quantity", "known_at", "late", "stress", "offset",
    ),
    "catalog": ("event_id", "item_id", "event_time", "kind", "known_at", "price", "stock", "offset"),
    "changes": (
        "event_id", "item_id", "event_time", "known_at", "listed", "title", "category", "brand", "price", "attributes",
        "offset",
    ),
    "forgotten": ("event_id", "user_id", "event_time", "offset", "shown_before"),
}  # fmt: skip
_TIMES = ("event_time", "known_at")
_CATALOG_KINDS = {int(EventKind.PRICE): "price", int(EventKind.STOCK): "stock"}
_LABELS = {int(t): t.label for t in EventType}
_NAME = re.compile(r"([a-z]?\d+)-(\d+)-(\d+)\.parquet")
_ROW_GROUP_ROWS = 1 << 16
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """What a file's name says: offsets first to last, both included, of a source."""

    source: str
    first: int
    last: int

    @classmethod
    def of(cls, path: Path) -> Span:
        """Of a file that `found` listed."""
        match = _NAME.fullmatch(path.name)
        assert match, path
        return cls(match[1], int(match[2]), int(match[3]))

    @property
    def file_name(self) -> str:
        """The name itself."""
        return f"{self.source}-{self.first}-{self.last}.parquet"


def found(root: Path, folder: str, first_day: str = "", last_day: str = "9") -> list[Path]:
    """Files of a folder's days, by day, source and offset; a file comes before those that were merged into it."""
    days = [d for d in (root / folder).glob("day=*") if first_day <= d.name.removeprefix("day=") <= last_day]
    days = [root / folder] if folder == ITEMS else days
    files = [p for day in days for p in day.glob("*.parquet") if _NAME.fullmatch(p.name)]
    spans = {p: Span.of(p) for p in files}
    return sorted(files, key=lambda p: (p.parent.name, spans[p].source, spans[p].first, -spans[p].last))


def split(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Files in the order of `found` as (those to read, those that have been merged into one of them)."""
    whole: list[Path] = []
    merged: list[Path] = []
    for _, group in groupby(files, key=lambda p: (p.parent, Span.of(p).source)):
        last = -1
        for path in group:
            span = Span.of(path)
            (whole if span.last > last else merged).append(path)
            last = max(last, span.last)
    return whole, merged


def drop_unfinished(root: Path, ends: Mapping[str, int]) -> None:
    """Delete what a flush that did not get through has left of these sources: files behind the ends of their coverage.

    They may reach further than the next flush will, so that both would have some rows.
    """
    for folder in (*DAILY, ITEMS):
        for path in found(root, folder):
            span = Span.of(path)
            if span.source in ends and span.first >= ends[span.source]:
                path.unlink(missing_ok=True)


def tables(frame: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Journal rows (EVENT_SCHEMA, source, offset, shown_before) by the folder that they go to."""
    frame = frame.with_columns(pl.from_epoch(pl.col(c), "us").dt.replace_time_zone("UTC") for c in _TIMES)
    kind = pl.col("kind")
    actions = frame.filter(kind == int(EventKind.ACTION)).with_columns(
        pl.col("event_type").replace_strict(_LABELS, return_dtype=pl.String)
    )
    item = pl.when(pl.col("listed")).then(pl.lit("list")).otherwise(pl.lit("delist"))
    changes = frame.filter(kind.is_in([int(k) for k in (EventKind.PRICE, EventKind.STOCK, EventKind.ITEM)]))
    named = kind.replace_strict(_CATALOG_KINDS, default=None, return_dtype=pl.String).fill_null(item)
    parts = {
        "events": actions,
        "catalog": changes.with_columns(kind=named),
        "changes": frame.filter(kind == int(EventKind.ITEM)),
        "forgotten": frame.filter(kind == int(EventKind.FORGET)),
    }
    return {folder: rows.select("source", *COLUMNS[folder]) for folder, rows in parts.items() if len(rows)}


class Writes:
    """Files written under temporary names; `commit` syncs them all and then renames them. One by one, each sync would
    wait for the disk by itself: 4 ms against 0.2 ms here.

    Everything raises Overloaded where the disk is full, and then nothing is pending.
    """

    def __init__(self) -> None:
        self._id = uuid.uuid4().hex[:8]  # not the process's: in containers each has the same
        self._pending: list[tuple[Path, Path]] = []

    def parquet(self, path: Path, frame: pl.DataFrame) -> None:
        """One Parquet file."""
        table: pa.Table = frame.to_arrow()
        strings = [f.with_type(pa.string()) if pa.types.is_large_string(f.type) else f for f in table.schema]
        table = table.cast(pa.schema(strings))
        with self._writing(path):
            pq.write_table(table, self._temporary(path), compression="zstd", row_group_size=_ROW_GROUP_ROWS)

    def arrow(self, path: Path, table: pa.Table) -> None:
        """One Arrow IPC file."""
        with (
            self._writing(path),
            pa.OSFile(str(self._temporary(path)), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)

    def text(self, path: Path, content: str) -> None:
        """One text file."""
        with self._writing(path):
            self._temporary(path).write_text(content, "utf-8")

    def commit(self) -> None:
        """Durable under their names on return."""
        for temporary, path in self._pending:
            with self._writing(path):
                _sync(temporary)
        for temporary, path in self._pending:
            with self._writing(path):
                temporary.replace(path)
        for folder in {path.parent for _, path in self._pending}:
            with self._writing(folder):
                _sync(folder)
        self._pending = []

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """As `writing`; what is refused leaves nothing behind that takes room, too."""
        try:
            with writing(path):
                yield
        except (OSError, Overloaded):
            for temporary, _ in self._pending:
                temporary.unlink(missing_ok=True)
            self._pending = []
            raise

    def _temporary(self, path: Path) -> Path:
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{self._id}.tmp")
        self._pending.append((temporary, path))
        return temporary


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what makes a file of an archive. Raises: Overloaded where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise Overloaded(
            f"archive file {path}", came=str(error), expected="room on the disk", fix="Free disk; the job asks again."
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder that is missing; durable on return."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
