"""Reading an archive as it was taken: every accepted event once, with what tells a slate from actions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.commit import EntityKind, OffsetStep, other_log
from feature_store.materialize import Archived, Covered
from recsys.core import EventBatch, EventKind, VersionMismatch
from recsys.core.events import EVENT_TYPE_BY_LABEL
from streaming.archive.coverage import covered
from streaming.archive.files import CATALOG, SHOWN, Span, found, split
from streaming.archive.tombstones import tombstones, without
from streaming.log.base import Log
from streaming.topics import Topics

_TYPES = {label: int(t) for label, t in EVENT_TYPE_BY_LABEL.items()}
_KINDS = {"price": int(EventKind.PRICE), "stock": int(EventKind.STOCK)}


def is_archive(root: Path) -> bool:
    """Whether a directory is an archive of a log, not a dataset that was imported."""
    return bool(log_of(root))


def log_of(root: Path) -> str:
    """Id of the log that an archive is of; "" for other datasets."""
    path = root / "dataset.json"
    return str(json.loads(path.read_text("utf-8")).get("log", "")) if path.is_file() else ""


def goes_on(root: Path) -> Covered:
    """Where streaming goes on after a rebuild from an archive, and who stays out of it.

    Raises: VersionMismatch naming the first hole in the offsets that the archive has.
    """
    stones = tombstones(root).group_by("user_id").agg(pl.col("until_us").max()).sort("user_id")
    offsets = []
    for source, coverage in covered(root).items():
        coverage.check_whole(f"archive {root}")
        side: EntityKind = "item" if source.startswith(CATALOG) else "user"
        offsets.append(OffsetStep(coverage.topic, coverage.partition, 0, coverage.end, side))
    return Covered(
        log_id=log_of(root), offsets=offsets, users=stones["user_id"].to_list(), until_us=stones["until_us"].to_list()
    )


def starts_at(log: Log, topics: Topics) -> Covered:
    """Where streaming starts after a rebuild from a dataset that is of no log: at the first record still there."""
    sides: dict[str, EntityKind] = {topics.events: "user", topics.impressions: "user", topics.catalog: "item"}
    begins = {t: log.begin_offsets(t) for t in sides}
    offsets = [OffsetStep(t, p, 0, first, sides[t]) for t, at in begins.items() for p, first in at.items() if first]
    return Covered(log_id=log.log_id(), offsets=offsets)


def check_reaches(covered: Covered, log: Log, topics: Topics) -> None:
    """Raises: VersionMismatch when the log is another one, or begins behind what is covered."""
    if (log_id := log.log_id()) != covered.log_id:
        raise other_log("archive", log_id, covered.log_id)
    ends = {(o.topic, o.partition): o.next for o in covered.offsets}
    for topic in (topics.events, topics.impressions, topics.catalog):
        for partition, begin in log.begin_offsets(topic).items():
            if (end := ends.get((topic, partition), 0)) < begin:
                raise VersionMismatch(
                    f"{topic}, partition {partition}",
                    came=f"no offsets {end} to {begin - 1}: behind the archive, and gone from the log",
                    expected="an archive that reaches to the log's first record",
                    fix="Rebuild from a newer copy of the archive.",
                )


def archived(root: Path, *, rows_max: int = 65_536) -> Iterator[Archived]:
    """Everything that its coverage has, in no order of time, at most about rows_max rows at once.

    Rows behind a tombstone are left out, whether they have been rewritten away yet or not.
    """
    ends = {source: c.end for source, c in covered(root).items()}
    stones = tombstones(root)
    for folder in ("changes", "catalog", "events"):
        whole, _ = split(found(root, folder))
        read: dict[tuple[str, str], int] = {}  # by day and source, up to which offset
        for path in whole:
            span, day = Span.of(path), path.parent.name
            # A flush that did not get through leaves files that reach further than the coverage, or into the next.
            first, end = read.get((day, span.source), span.first), ends.get(span.source, 0)
            read[day, span.source] = min(span.last + 1, end)
            if first >= end:
                continue
            for rows in _record_by_record(path, rows_max):
                rows = rows.filter(pl.col("offset").is_between(first, end - 1)).with_columns(source=pl.lit(span.source))
                yield _as_archived(without(rows, stones) if folder == "events" else rows, folder, span.source)


def _record_by_record(path: Path, rows_max: int) -> Iterator[pl.DataFrame]:
    """A file in pieces; the events of one record (a slate) stay together."""
    left = pl.DataFrame()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(rows_max):
            frame = pl.from_arrow(pa.Table.from_batches([batch]))
            assert isinstance(frame, pl.DataFrame)
            frame = pl.concat([left, frame]) if len(left) else frame
            is_last = frame["offset"] == frame["offset"][-1]
            left = frame.filter(is_last)
            if not is_last.all():
                yield frame.filter(~is_last)
    if len(left):
        yield left


def _as_archived(rows: pl.DataFrame, folder: str, source: str) -> Archived:
    slate = rows["offset"].to_numpy() if source.startswith(SHOWN) else np.full(len(rows), -1, np.int64)
    if folder == "events":
        kind = pl.lit(int(EventKind.ACTION), pl.Int8)
        rows = rows.with_columns(pl.col("event_type").replace_strict(_TYPES, return_dtype=pl.Int8))
    elif folder == "changes":
        kind = pl.lit(int(EventKind.ITEM), pl.Int8)
    else:
        keep = rows["kind"].is_in(list(_KINDS))  # listings are in `changes`, with their texts
        rows, slate = rows.filter(keep), slate[keep.to_numpy()]
        kind = pl.col("kind").replace_strict(_KINDS, return_dtype=pl.Int8)
    times = pl.col("event_time", "known_at").dt.timestamp("us")
    return Archived(
        EventBatch.from_table(rows.with_columns(times, kind=kind).drop("offset", "source").to_arrow()), slate
    )
