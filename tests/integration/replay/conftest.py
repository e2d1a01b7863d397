"""A small real dataset and a run that holds the light indexes only: everything replay needs for arms without models."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from feature_store.views import VIEW_SET
from recsys.candidates.indexes import build_all
from recsys.core import RunDirectory, RunWriter
from recsys.data import Dataset, import_dataset
from recsys.data.schema import TIME


@pytest.fixture(scope="session")
def cut_us() -> int:
    """Four weeks before the data's end."""
    return int(datetime(2017, 12, 4, tzinfo=UTC).timestamp()) * 1_000_000


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Path:
    """60 households of Complete Journey as a dataset directory."""
    out = tmp_path_factory.mktemp("shop") / "data"
    import_dataset("complete-journey", None, out, options={"households": "60"})
    return out


@pytest.fixture(scope="session")
def truncated(shop, cut_us, tmp_path_factory) -> Path:
    """The same shop as it was at the cut: no event and no item from then on."""
    return truncate(shop, tmp_path_factory.mktemp("truncated") / "data", cut_us)


@pytest.fixture(scope="session")
def learnt_late(shop, cut_us, tmp_path_factory) -> Path:
    """The same shop, where all that is bought from the cut on was carted an hour before it, and nobody knew in time."""
    out = tmp_path_factory.mktemp("learnt_late") / "data"
    shutil.copytree(shop, out)
    events, cut = pl.read_parquet(out / "events.parquet"), pl.lit(cut_us).cast(TIME)
    carts = events.filter(pl.col("event_time") >= cut).with_columns(
        event_id=pl.format("late-{}", "event_id"),
        event_type=pl.lit("cart"),
        event_time=cut - pl.duration(hours=1),
        known_at=cut + pl.duration(days=60),
    )
    both = pl.concat([events, carts], how="diagonal").sort("event_time", maintain_order=True)
    both.write_parquet(out / "events.parquet")
    return out


@pytest.fixture(scope="session")
def make_light_run() -> Callable[[Path, Path, int], RunDirectory]:
    """A run of the light indexes: (dataset, out, until_us)."""
    return write_light_run


@pytest.fixture(scope="session")
def light_run(shop, cut_us, tmp_path_factory) -> RunDirectory:
    return write_light_run(shop, tmp_path_factory.mktemp("runs") / "light", cut_us)


def truncate(data: Path, out: Path, cut_us: int) -> Path:
    out.mkdir(parents=True)
    for name, column in (("events", "event_time"), ("items", "available_from")):
        frame = pl.read_parquet(data / f"{name}.parquet")
        kept = frame.filter((pl.col(column).dt.epoch("us") < cut_us) | pl.col(column).is_null())
        assert len(kept) < len(frame), "the cut must take something away"
        kept.write_parquet(out / f"{name}.parquet")
    info = json.loads((data / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({k: v for k, v in info.items() if k != "hash"}))
    return out


def write_light_run(data: Path, out: Path, until_us: int) -> RunDirectory:
    dataset = Dataset.open(data)
    items = dataset.item_table(before_us=until_us)
    fields = {
        "run_id": "light", "parent": None, "dataset_hash": dataset.hash, "until": until_us, "seed": 0, "config": {},
        "versions": {}, "commit": "test", "feature_views": VIEW_SET, "measures": {},
    }  # fmt: skip
    with RunWriter(out, fields) as writer:
        items.write(writer.path("items.parquet"))
        for name, table in build_all(dataset.events(before_us=until_us), items, until_us).items():
            pq.write_table(table, writer.path(f"index/{name}.parquet"))
    return RunDirectory.open(out)
