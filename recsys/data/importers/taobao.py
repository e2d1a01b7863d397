"""taobao: the original UserBehavior.csv, no header: user, item, category, behaviour (pv|buy|cart|fav), seconds.

The log covers 2017-11-25 to 2017-12-03 in Beijing; rows outside (the original has some, even before 1970) are set
aside. The original has 100 million rows and is not in time order: it is read in batches, put down by hour in the
scratch folder, and sorted an hour at a time, so that memory is bounded by a batch, the busiest hour and the items.
Source: https://tianchi.aliyun.com/dataset/649 (Zhu et al., KDD 2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from recsys.core import disk
from recsys.data.importers import base
from recsys.data.importers.multi_behaviour import behaviour

COLUMNS = ("user_id", "item_id", "category_id", "behavior", "timestamp")
_FROM, _TO = datetime(2017, 11, 24, 16, tzinfo=UTC), datetime(2017, 12, 3, 16, tzinfo=UTC)


def _read(source: base.Source) -> base.Imported:
    path = source.find("UserBehavior.csv", "UserBehavior.csv.gz")
    mark, hours = base.fingerprint(path), source.scratch / "hours"
    items, aside = pl.DataFrame(), []
    for number, batch in enumerate(base.csv_batches(path, source.scratch, required=COLUMNS, header=False)):
        rows, rejected = _checked(batch, path)
        aside.append(rejected)
        items = _first_known(pl.concat([items, rows.select("item_id", "category_id", "timestamp")], how="diagonal"))
        _put_down(rows.with_columns(base.event_ids(mark)), hours, number)
    items = items.rename({"timestamp": "available_from", "category_id": "category"})
    return base.Imported(events=_by_hour(hours), items=items, rejected=pl.concat(aside))


def _checked(rows: pl.DataFrame, path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    base.require(rows, path, COLUMNS)
    rows = base.parse(rows, path, {"behavior": behaviour("behavior"), "timestamp": base.epoch("timestamp", "s")})
    outside = ~pl.col("timestamp").is_between(_FROM, _TO, closed="left")
    return base.split(rows, path, {"outside_the_log": outside, "bad_id": base.bad_ids()})


def _first_known(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per item: the time of its earliest row, and the category there."""
    return rows.sort("timestamp", maintain_order=True).unique("item_id", keep="first", maintain_order=True)


def _put_down(rows: pl.DataFrame, folder: Path, number: int) -> None:
    for (hour,), part in rows.group_by(pl.col("timestamp").dt.strftime("%Y%m%d%H"), maintain_order=True):
        (folder / str(hour)).mkdir(parents=True, exist_ok=True)
        with disk.writing(folder):
            part.write_parquet(folder / str(hour) / f"{number:06d}.parquet", compression="lz4")


def _by_hour(folder: Path) -> Iterator[pl.DataFrame]:
    """The events in time order, an hour a frame; ties keep the order of the file."""
    for hour in sorted(folder.iterdir()) if folder.is_dir() else []:
        rows = pl.read_parquet(sorted(hour.iterdir()))
        yield rows.sort("timestamp", maintain_order=True).select(
            "event_id", "user_id", "item_id", event_type=pl.col("behavior"), event_time=pl.col("timestamp")
        )


IMPORTER = base.Importer(format="taobao", licence="CC BY-NC-SA 4.0 (Tianchi)", read=_read)
