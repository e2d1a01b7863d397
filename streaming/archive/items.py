"""items.parquet of an archive: every item that was listed or acted on, as first known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from streaming.archive.files import Writes, found, split

_TEXT = ("title", "category", "brand", "price", "attributes")
_PENDING_MAX = 64


class Items:
    """Grows items.parquet by what was flushed; the first time in a process it goes through all files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "items.parquet"
        self._pending: list[pl.DataFrame] = []
        self._is_known = False
        if self._path.is_file() and "listed" in pl.read_parquet_schema(self._path):
            at_s = self._path.stat().st_mtime
            files = [*found(root, "changes"), *found(root, "events")]
            self._is_known = all(p.stat().st_mtime <= at_s for p in files)

    def add(self, tables: Mapping[str, pl.DataFrame]) -> None:
        """Rows that were flushed, by folder."""
        if self._is_known:
            self._pending += [_first_seen(f, tables[f].lazy()) for f in ("changes", "events") if f in tables]
            if len(self._pending) > _PENDING_MAX:
                self._pending = [_merged(self._pending)]

    def write(self) -> None:
        """Durable on return; nothing is written when nothing has come."""
        if self._is_known and not self._pending:
            return
        parts = [pl.read_parquet(self._path)] if self._is_known else self._scanned()
        parts = [p.rename({"available_from": "event_time"}) if "available_from" in p.columns else p for p in parts]
        parts += self._pending
        if not parts:
            return
        writes = Writes()
        writes.parquet(self._path, _merged(parts).rename({"event_time": "available_from"}))
        writes.commit()
        self._pending, self._is_known = [], True

    def _scanned(self) -> list[pl.DataFrame]:
        parts = []
        for folder in ("changes", "events"):
            whole, _ = split(found(self._root, folder))
            if whole:
                parts.append(_first_seen(folder, pl.scan_parquet(whole, hive_partitioning=False)))
        return parts


def _first_seen(folder: str, rows: pl.LazyFrame) -> pl.DataFrame:
    """Listings with the first of every text, or the first action."""
    time = pl.col("event_time")
    if folder == "events":
        return rows.group_by("item_id").agg(time.min()).with_columns(listed=pl.lit(False)).collect()
    listed = rows.filter(pl.col("listed")).sort("event_time").group_by("item_id")
    first = listed.agg(time.min(), *(pl.col(c).drop_nulls().first() for c in _TEXT))
    return first.with_columns(listed=pl.lit(True)).collect()


def _merged(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """Of several first sightings of an item the earliest listing, else the earliest action; texts as first known."""
    frame = pl.concat(parts, how="diagonal")
    absent = {c: pl.Int64 if c == "price" else pl.String for c in _TEXT if c not in frame.columns}
    frame = frame.with_columns(pl.lit(None, kind).alias(c) for c, kind in absent.items())
    frame = frame.sort(pl.col("listed").not_(), "event_time", maintain_order=True)
    texts = (pl.col(c).drop_nulls().first() for c in _TEXT)
    items = frame.group_by("item_id").agg(pl.col("event_time").first(), *texts, pl.col("listed").first())
    return items.sort("item_id")
