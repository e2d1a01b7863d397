"""items.parquet of an archive: every item that was listed or acted on, as first known."""

from __future__ import annotations

import os
import time
from pathlib import Path

import polars as pl

from streaming.archive.files import Writes, found, split

_TEXT = ("title", "category", "brand", "price", "attributes")


def write_items(root: Path) -> None:
    """Bring items.parquet up to date with the files that have come since, whoever wrote them; durable on return.

    Its own time says up to when it has seen files: a file's ctime is when it got its name.
    """
    path, started_ns = root / "items.parquet", time.time_ns()
    is_ours = path.is_file() and "listed" in pl.read_parquet_schema(path)
    since_ns = path.stat().st_mtime_ns if is_ours else 0
    parts = []
    for folder in ("changes", "events"):
        whole, _ = split(found(root, folder))
        if new := [p for p in whole if p.stat().st_ctime_ns >= since_ns]:
            parts.append(_first_seen(folder, pl.scan_parquet(new, hive_partitioning=False)))
    if not parts:
        return
    if is_ours:
        parts.append(pl.read_parquet(path).rename({"available_from": "event_time"}))
    writes = Writes()
    writes.parquet(path, _merged(parts).rename({"event_time": "available_from"}))
    writes.commit()
    os.utime(path, ns=(started_ns, started_ns))


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
