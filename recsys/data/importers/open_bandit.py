"""open-bandit: one campaign of the Open Bandit Dataset, e.g. random/all/all.csv.gz with item_context.csv beside it.

Every row is an impression with its position (1 to 3) and its true propensity; a clicked one is followed by a view with
the same request_id and time. Users are anonymous: user_id is their four features, so it names a segment. The catalogue
of a campaign never changes: it is static.
Source: Saito, Aihara, Matsutani and Narita, NeurIPS Datasets and Benchmarks 2021, https://research.zozo.com/data.html.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recsys.data.importers import base

_FEATURES = tuple(f"user_feature_{i}" for i in range(4))
COLUMNS = ("timestamp", "item_id", "position", "click", "propensity_score", *_FEATURES)
_CONTEXT = "item_context.csv"


def _read(source: base.Source) -> base.Imported:
    path = source.find("all.csv", "men.csv", "women.csv", "all.csv.gz", "men.csv.gz", "women.csv.gz")
    rows = base.read_csv(path, source.scratch, required=COLUMNS)
    base.require(rows, path, COLUMNS)
    rows = base.parse(
        rows,
        path,
        {
            "timestamp": (_time("timestamp"), "a time like 2019-11-24 00:00:34.762830+00:00"),
            "position": (pl.col("position").cast(pl.Int32, strict=False), "a whole number"),
            "click": (pl.col("click").replace_strict({"0": 0, "1": 1}, default=None, return_dtype=pl.Int8), "0 or 1"),
            "propensity_score": (pl.col("propensity_score").cast(pl.Float32, strict=False), "a number"),
        },
    )
    chance = pl.col("propensity_score")
    rules = {
        "bad_position": pl.col("position") < 1,
        "bad_propensity": ~((chance > 0) & (chance <= 1)),
        "bad_id": base.bad_ids("item_id"),
        "bad_time": base.bad_time("timestamp"),
    }
    rows, rejected = base.split(rows, path, rules)
    shown = rows.select(
        base.event_ids(base.fingerprint(path)),
        "item_id",
        "position",
        "click",
        user_id=pl.concat_str([pl.col(f).str.head(8) for f in _FEATURES], separator="-"),
        event_type=pl.lit("impression"),
        event_time=pl.col("timestamp"),
        request_id=base.event_ids(base.fingerprint(path)),
        propensity=chance,
    )
    clicked = shown.filter(pl.col("click") == 1).with_columns(
        event_id=pl.format("{}-click", "event_id"), event_type=pl.lit("view")
    )
    events = pl.concat([shown, clicked]).drop("click").sort("event_time", maintain_order=True)
    return base.Imported(
        events=events,
        items=_items(path.with_name(_CONTEXT), events, source.scratch),
        rejected=rejected,
        static_catalogue=True,
        info={"logging_policy": path.parent.parent.name},
    )


def _time(column: str) -> pl.Expr:
    zoned = pl.col(column).str.replace(" ", "T")
    return pl.coalesce(
        zoned.str.to_datetime(f, time_unit="us", time_zone="UTC", strict=False)
        for f in ("%Y-%m-%dT%H:%M:%S%.f%z", "%Y-%m-%dT%H:%M:%S%z")
    )


def _items(path: Path, events: pl.DataFrame, scratch: Path) -> pl.DataFrame:
    """Items of item_context.csv with their features as attributes, and those that only the log knows."""
    seen = events.select("item_id").unique(maintain_order=True)
    if not path.is_file():
        return seen
    features = [f"item_feature_{i}" for i in range(4)]
    rows = base.read_csv(path, scratch, required=("item_id", *features))
    known = rows.unique("item_id", keep="first", maintain_order=True).select(
        "item_id", attributes=pl.struct(features).struct.json_encode()
    )
    return pl.concat([known, seen.join(known, on="item_id", how="anti")], how="diagonal")


IMPORTER = base.Importer(format="open-bandit", licence="CC BY 4.0", read=_read)
