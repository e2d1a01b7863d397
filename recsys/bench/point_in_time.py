"""Point-in-time join, Parquet to Parquet: labels and five views of four columns, a tenth of the values known late.

peer: Polars' join_asof by entity, the whole of each file in memory. limit: all files read and written again, unjoined.
Each in a process of its own, so that peak memory is its own; rows of CPU time beside those of wall time, for machines
that are not quiet.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from feature_store.point_in_time import ViewFile, join_files
from recsys.bench.harness import Cost, Row, alone, sampled
from recsys.bench.made_up import START_US

VIEWS, _COLUMNS = 5, 4
_SPAN_US, _LATE_US, _MAX_AGE_US = 90 * 86_400 * 1_000_000, 86_400 * 1_000_000, 30 * 86_400 * 1_000_000
_ROWS_WRITTEN = 1 << 20


def write(folder: Path, num_rows: int, num_entities: int) -> None:
    """labels.parquet and view-0.parquet to view-4.parquet, seeded, piece by piece; rows in no order of time."""
    ids = pl.Series([f"u{n:07d}" for n in range(num_entities)])
    for name, seed in [("labels", VIEWS), *((f"view-{v}", v) for v in range(VIEWS))]:
        rng, writer = np.random.default_rng(seed), None
        for first in range(0, num_rows, _ROWS_WRITTEN):
            rows = min(_ROWS_WRITTEN, num_rows - first)
            at = START_US + rng.integers(0, _SPAN_US, rows)
            columns = {"user_id": ids.gather(rng.integers(0, num_entities, rows)), "event_time": at}
            if name == "labels":
                columns["label"] = rng.integers(0, 2, rows)
            else:
                columns["known_at"] = at + np.where(rng.random(rows) < 0.1, rng.integers(0, _LATE_US, rows), 0)
                columns |= {f"v{seed}_{c}": rng.normal(size=rows) for c in range(_COLUMNS)}
            table = pl.DataFrame(columns).to_arrow()
            writer = writer or pq.ParquetWriter(folder / f"{name}.parquet", table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()


def ours(folder: Path) -> None:
    """The join as training calls it."""
    views = [ViewFile(path=_view(folder, v), by="user_id", max_age_us=_MAX_AGE_US) for v in range(VIEWS)]
    join_files(folder / "labels.parquet", views, folder / "joined.parquet")


def plain(folder: Path) -> None:
    """The same by what a reader of Polars' manual would write; a late value may replace a newer one."""
    joined = pl.read_parquet(folder / "labels.parquet").sort("event_time")
    for v in range(VIEWS):
        values = pl.read_parquet(_view(folder, v)).rename({"event_time": "held"}).sort("known_at")
        joined = joined.join_asof(
            values,
            left_on="event_time",
            right_on="known_at",
            by="user_id",
            allow_exact_matches=False,
            check_sortedness=False,
        ).drop("known_at", "held")
    joined.write_parquet(folder / "plain.parquet")


def copy(folder: Path) -> None:
    """All files read and written."""
    for source in [folder / "labels.parquet", *(_view(folder, v) for v in range(VIEWS))]:
        with pq.ParquetFile(source) as file, pq.ParquetWriter(folder / "copy.parquet", file.schema_arrow) as writer:
            for batch in file.iter_batches(_ROWS_WRITTEN):
                writer.write_batch(batch)


def bench(folder: Path, num_rows: int, num_entities: int, repeats: int) -> list[Row]:
    """Seconds, CPU seconds and peak memory, each contestant `repeats` times in turn."""
    write(folder, num_rows, num_entities)
    contestants: dict[str, tuple[str, Callable[[Path], None]]] = {
        "ours": ("double11 join_files", ours),
        "peer": ("polars join_asof by entity, in memory", plain),
        "limit": ("the files read and written, unjoined", copy),
    }
    costs: dict[str, list[Cost]] = {role: [] for role in contestants}
    for _ in range(repeats):
        for role, (_, work) in contestants.items():
            costs[role].append(alone(work, folder))
    what = f"point-in-time join, {num_rows:,} labels x {VIEWS} views"
    measured = (("wall", "s", "seconds"), ("CPU", "s", "cpu_s"), ("peak memory", "GiB", "gib"))
    return [
        sampled(
            f"{what}, {of}",
            unit,
            {role: (contestants[role][0], [getattr(c, name) for c in found]) for role, found in costs.items()},
        )
        for of, unit, name in measured
    ]


def _view(folder: Path, view: int) -> Path:
    return folder / f"view-{view}.parquet"
