"""Tombstones of an archive: rows of users who asked to be forgotten are left out, and later rewritten away.

The same rule as online (`feature_store.forget`): out goes what happened up to the forget event's time, and what had
arrived before it, whenever it happened.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from streaming.archive.files import EVENTS, SHOWN, Span, found, split

_FORGETS = ("user_id", "event_time", "source", "offset", "shown_before")
_SCHEMA = {"user_id": pl.String, "until_us": pl.Int64, "of": pl.String, "before": pl.Int64, "shown_before": pl.Int64}


def tombstones(root: Path, waiting: pl.DataFrame | None = None) -> pl.DataFrame:
    """All that the archive has: user_id, until_us, of (source of the forget event), before (its offset), shown_before
    (offset of its user's slates then). waiting: rows of `forgotten` that have not been flushed.
    """
    whole, _ = split(found(root, "forgotten"))
    forgets = [
        pl.read_parquet(f, hive_partitioning=False).with_columns(source=pl.lit(Span.of(f).source)) for f in whole
    ]
    return effective([f.select(_FORGETS) for f in [*forgets, *([] if waiting is None else [waiting])]])


def effective(forgets: list[pl.DataFrame]) -> pl.DataFrame:
    """Tombstones of forget events (columns of `forgotten` and source). One that is not newer than an earlier one of its
    user changes nothing.
    """
    if not forgets:
        return pl.DataFrame(schema=_SCHEMA)
    frame = pl.concat(forgets, how="vertical").select(
        "user_id",
        pl.col("event_time").dt.timestamp("us").alias("until_us"),
        pl.col("source").alias("of"),
        pl.col("offset").alias("before"),
        "shown_before",
    )
    frame = frame.sort("before")
    earlier = pl.col("until_us").cum_max().shift(1).over("user_id", "of").fill_null(-1)
    return frame.filter(pl.col("until_us") > earlier)


def without(rows: pl.DataFrame, stones: pl.DataFrame) -> pl.DataFrame:
    """Rows (user_id, event_time, source, offset) that no tombstone concerns, in order. event_time may be in µs."""
    if not len(stones) or not len(rows):
        return rows
    mine = rows.select("user_id", "event_time", "source", "offset").with_row_index()
    mine = mine.filter(pl.col("user_id").is_in(stones["user_id"].implode()))
    if not len(mine):
        return rows
    source, of, offset = pl.col("source"), pl.col("of"), pl.col("offset")
    arrived = ((source == EVENTS + of) & (offset < pl.col("before"))) | (
        (source == SHOWN + of) & (offset < pl.col("shown_before"))
    )
    time = pl.col("event_time")
    happened = (time if rows.schema["event_time"] == pl.Int64 else time.dt.timestamp("us")) <= pl.col("until_us")
    gone = mine.join(stones, on="user_id").filter(happened | arrived)["index"].unique()
    return rows.with_row_index().filter(~pl.col("index").is_in(gone.implode())).drop("index")
