"""Labelled samples of the impression join: ROOT/samples/day=YYYY-MM-DD/*.parquet, by the impression's day.

    PARTITION-START-END.parquet    impressions of [START, END) microseconds, written when their window was over
    late-PARTITION-NUMBER.parquet  samples that replace earlier ones with the same sample_id, by ascending number

Names are a function of what a file holds, so writing it again after a crash replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from recsys.core import NotFound

COLUMNS: Mapping[str, pl.DataType] = {
    "sample_id": pl.String(), "request_id": pl.String(), "user_id": pl.String(), "item_id": pl.String(),
    "event_time_us": pl.Int64(), "position": pl.Int32(), "propensity": pl.Float32(),
    "action_types": pl.List(pl.Int32()), "action_time_us": pl.Int64(), "late": pl.Boolean(), "stress": pl.Boolean(),
    "source": pl.String(), "offset": pl.Int64(),
}  # fmt: skip


def by_day(samples: pl.DataFrame, root: Path, name: str, *, late: bool = False) -> dict[Path, pl.DataFrame]:
    """The files that samples belong in."""
    day = pl.from_epoch("event_time_us", "us").dt.strftime("%Y-%m-%d").alias("day")
    frame = samples.with_columns(late=pl.lit(late)).select(pl.col(c).cast(t) for c, t in COLUMNS.items())
    groups = frame.group_by(day, maintain_order=True)
    return {root / "samples" / f"day={at}" / f"{name}.parquet": rows for (at,), rows in groups}


def read_samples(root: Path, days: Sequence[str] | None = None) -> pl.LazyFrame:
    """Samples of some days (YYYY-MM-DD), or of all: each once, as it was joined last. Raises: NotFound."""
    files = sorted((root / "samples").glob("day=*/*.parquet"), key=lambda p: (p.name.startswith("late-"), p.name))
    if days is not None:
        files = [p for p in files if p.parent.name.removeprefix("day=") in set(days)]
    if not files:
        raise NotFound(
            f"offline store {root}, samples",
            came="no file",
            expected="samples/day=YYYY-MM-DD/*.parquet",
            fix="Let ingest write them: --archive DIR --offline DIR.",
        )
    return pl.scan_parquet(files, hive_partitioning=False).unique("sample_id", keep="last", maintain_order=True)
