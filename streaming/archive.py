"""The archive: a dataset directory that grows with the log. Files are named after the offsets they hold.

DIR/events/day=YYYY-MM-DD/PARTITION-FIRST-LAST.parquet    accepted actions, late ones marked
DIR/catalog/day=.../                                      listings, prices, stock
DIR/changes/day=.../                                      item changes with texts: the source of items.parquet
DIR/items.parquet, DIR/dataset.json                       written by `finish`

Files are written and synced before the store's offset moves. A batch read again after a crash may be cut otherwise,
so whatever begins at or after the stored offset is deleted at start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core import EventBatch, EventKind, EventType

_EVENTS = (
    "event_id", "user_id", "item_id", "event_type", "event_time", "session_id", "request_id", "position", "propensity",
    "price", "quantity", "known_at", "late", "stress",
)  # fmt: skip
_CATALOG = ("event_id", "item_id", "event_time", "kind", "known_at", "price", "stock")
_CHANGES = ("event_id", "item_id", "event_time", "listed", "title", "category", "brand", "price", "attributes")
_TIMES = ("event_time", "known_at")
_CATALOG_KINDS = {int(EventKind.PRICE): "price", int(EventKind.STOCK): "stock"}
_LABELS = {int(t): t.label for t in EventType}


class Archive:
    """Writes accepted events of one log. One per archive directory."""

    def __init__(self, root: Path, source: str) -> None:
        """source: the log's URL, for dataset.json."""
        self.root, self.source = root, source
        self._finished = False
        root.mkdir(parents=True, exist_ok=True)

    def truncate(self, prefix: str, offsets: Mapping[int, int]) -> None:
        """Delete files of a topic that begin at or after the stored offset of their partition."""
        for path in self.root.glob(f"*/day=*/{prefix}[0-9]*-*-*.parquet"):
            partition, first, _ = path.stem.removeprefix(prefix).split("-")
            if int(first) >= offsets.get(int(partition), 0):
                path.unlink()

    def write(self, prefix: str, partition: int, first: int, last: int, batch: EventBatch) -> None:
        """Write one partition's events of offsets first to last, by day; synced on return.

        prefix keeps topics apart: "" for events, a letter for the others.
        """
        self._finished = False
        frame = pl.from_arrow(batch.table)
        assert isinstance(frame, pl.DataFrame)
        frame = frame.with_columns(pl.from_epoch(pl.col(c), "us").dt.replace_time_zone("UTC") for c in _TIMES)
        name = f"{prefix}{partition}-{first}-{last}.parquet"
        kind = pl.col("kind")
        actions = frame.filter(kind == int(EventKind.ACTION)).with_columns(
            pl.col("event_type").replace_strict(_LABELS, return_dtype=pl.String)
        )
        self._put("events", name, actions.select(_EVENTS))
        item = pl.when(pl.col("listed")).then(pl.lit("list")).otherwise(pl.lit("delist"))
        changes = frame.filter(kind.is_in([int(k) for k in (EventKind.PRICE, EventKind.STOCK, EventKind.ITEM)]))
        named = kind.replace_strict(_CATALOG_KINDS, default=None, return_dtype=pl.String).fill_null(item)
        self._put("catalog", name, changes.with_columns(kind=named).select(_CATALOG))
        self._put("changes", name, frame.filter(kind == int(EventKind.ITEM)).select(_CHANGES))

    def finish(self) -> None:
        """Write items.parquet and dataset.json from what the folders hold, if they have changed."""
        if self._finished:
            return
        columns = ("title", "category", "brand", "price", "attributes")
        time = pl.col("event_time")
        parts = []
        if any(self.root.glob("changes/day=*/*.parquet")):
            changes = pl.scan_parquet(self.root / "changes/day=*/*.parquet", hive_partitioning=False).sort("event_time")
            listed = changes.filter(pl.col("listed")).group_by("item_id", maintain_order=True)
            parts.append(listed.agg(time.min(), *(pl.col(c).drop_nulls().first() for c in columns)))
        if any(self.root.glob("events/day=*/*.parquet")):
            acted = pl.scan_parquet(self.root / "events/day=*/*.parquet", hive_partitioning=False)
            parts.append(acted.group_by("item_id").agg(time.min()))
        if not parts:
            return
        # Listed items come first: they have texts, and the time since which they could be recommended.
        items = pl.concat(parts, how="diagonal").unique("item_id", keep="first", maintain_order=True)
        frame = items.rename({"event_time": "available_from"}).sort("item_id").collect()
        _write(self.root / "items.parquet", frame)
        document = {"format_version": 1, "format": "archive", "source": self.source, "static_catalogue": False}
        temporary = self.root / ".dataset.json.tmp"
        temporary.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        temporary.replace(self.root / "dataset.json")
        self._finished = True

    def _put(self, folder: str, name: str, frame: pl.DataFrame) -> None:
        if not len(frame):
            return
        for (day,), rows in frame.group_by(pl.col("event_time").dt.strftime("%Y-%m-%d"), maintain_order=True):
            path = self.root / folder / f"day={day}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, rows)


def _write(path: Path, frame: pl.DataFrame) -> None:
    """Write under a temporary name, sync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    table: pa.Table = frame.to_arrow()
    strings = [f.with_type(pa.string()) if pa.types.is_large_string(f.type) else f for f in table.schema]
    pq.write_table(table.cast(pa.schema(strings)), temporary, compression="zstd")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
