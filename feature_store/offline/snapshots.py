"""Snapshots of feature values: ROOT/KIND/day=YYYY-MM-DD.parquet, to be joined to labels by `point_in_time.join`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from feature_store.columns import EntityKind
from feature_store.state import decode
from feature_store.update import Load
from feature_store.views import ITEM, USER
from recsys.core import NotFound, disk

_ENTITIES_MAX = 1 << 16  # read at once


def snapshot(load: Load, kind: EntityKind, ids: Sequence[str], as_of_us: int) -> pl.DataFrame:
    """Values of entities as of a time: `<kind>_id`, event_time (int64 microseconds = as_of), one column per feature.

    A value that is not PRESENT is null; entities that nothing is known about are left out.
    """
    views = USER if kind == "user" else ITEM
    frames = []
    for start in range(0, len(ids), _ENTITIES_MAX):
        some = list(ids[start : start + _ENTITIES_MAX])
        state = decode(views.tables, load(kind, some))
        known = state["life"].counts > 0
        number = views.read(state, as_of_us).number[known]
        values = pl.DataFrame(number, schema=list(views.feature_names), orient="row").fill_nan(None)
        named = pl.Series(f"{kind}_id", [i for i, k in zip(some, known.tolist(), strict=True) if k], pl.String)
        frames.append(values.select(named, pl.lit(as_of_us, pl.Int64).alias("event_time"), pl.all()))
    schema = {f"{kind}_id": pl.String, "event_time": pl.Int64, **dict.fromkeys(views.feature_names, pl.Float64)}
    return pl.concat([pl.DataFrame(schema=schema), *frames])


def write(frame: pl.DataFrame, root: Path, kind: EntityKind) -> Path:
    """Write one snapshot as the day it is of; the same day again replaces it. Returns the file."""
    at_us = int(frame.get_column("event_time").max() or 0)  # type: ignore[arg-type]
    path = root / kind / f"day={np.datetime64(at_us, 'us').astype('datetime64[D]')}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with disk.writing(temporary):
        frame.write_parquet(temporary)
    temporary.replace(path)
    return path


def read(root: Path, kind: EntityKind) -> pl.LazyFrame:
    """All snapshots of a kind, oldest first. Raises: NotFound when there is none."""
    files = sorted((root / kind).glob("day=*.parquet"))
    if not files:
        raise NotFound(
            f"offline store {root}, {kind}",
            came="no snapshot",
            expected="day=YYYY-MM-DD.parquet",
            fix="Write snapshots first.",
        )
    return pl.scan_parquet(files, hive_partitioning=False)
