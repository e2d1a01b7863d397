"""Rewriting files without the rows of users who asked to be forgotten: of the archive, and of what follows from it."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from streaming.archive.files import Writes
from streaming.archive.tombstones import without


def derived(offline: Path) -> list[Path]:
    """Files of an offline store that have rows by user: samples, and snapshots of users."""
    return sorted([*offline.glob("samples/day=*/*.parquet"), *offline.glob("user/day=*.parquet")])


def purged(path: Path, stones: pl.DataFrame, source: str) -> int:
    """Rewrite one file without what is behind the tombstones, under its name; returns how many rows went.

    source: of a file of the archive. Samples carry their own; a snapshot has values made from everything up to then, so
    all rows of the user go.
    """
    try:
        users = pq.read_table(path, columns=["user_id"]).column("user_id").unique()
        if stones["user_id"].is_in(pl.Series(users.to_pylist(), dtype=pl.String).implode()).not_().all():
            return 0
        rows = pl.read_parquet(path, hive_partitioning=False)
    except FileNotFoundError:  # samples of a round, or a flush, that did not end, written anew
        return 0
    if "sample_id" in rows.columns:
        time = pl.from_epoch("event_time_us", "us").dt.replace_time_zone("UTC").alias("event_time")
        kept = without(rows.with_columns(time), stones).drop("event_time")
    elif source:
        kept = without(rows.with_columns(source=pl.lit(source)), stones).drop("source")
    else:
        kept = rows.filter(~pl.col("user_id").is_in(stones["user_id"].implode()))
    if len(kept) < len(rows):
        writes = Writes()
        writes.parquet(path, kept)
        writes.commit()
    return len(rows) - len(kept)
