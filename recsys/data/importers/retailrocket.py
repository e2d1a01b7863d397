"""retailrocket: the original events.csv: timestamp (ms), visitorid, event, itemid, transactionid.

With item_properties_part1.csv and item_properties_part2.csv beside it, items take their first known category, and the
property `available` becomes catalog.parquet (1 = list, 0 = delist). An item is available from its first property or
event, whichever is earlier: the weekly snapshots of properties start a week after the events.
Source: https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recsys.data.importers import base
from recsys.data.importers.multi_behaviour import behaviour

COLUMNS = ("timestamp", "visitorid", "event", "itemid", "transactionid")
PROPERTY_COLUMNS = ("timestamp", "itemid", "property", "value")


def _read(source: base.Source) -> base.Imported:
    path = source.find("events.csv", "events.csv.gz")
    rows = base.read_csv(path, source.scratch, required=COLUMNS)
    base.require(rows, path, COLUMNS[:4])
    rows = base.parse(rows, path, {"event": behaviour("event"), "timestamp": base.epoch("timestamp", "ms")})
    rules = {"bad_id": base.bad_ids("visitorid", "itemid"), "bad_time": base.bad_time("timestamp")}
    rows, rejected = base.split(rows, path, rules)
    events = rows.select(
        base.event_ids(base.fingerprint(path)),
        user_id=pl.col("visitorid"),
        item_id=pl.col("itemid"),
        event_type=pl.col("event"),
        event_time=pl.col("timestamp"),
        session_id=pl.col("transactionid"),
    ).sort("event_time", maintain_order=True)
    items = base.items_from_events(events)
    parts = sorted(p for p in path.parent.glob("item_properties_part*.csv*") if p.is_file())
    if not parts:
        return base.Imported(events=events, items=items, rejected=rejected)
    read = [_properties(part, source.scratch) for part in parts]
    known = pl.concat(rows for rows, _ in read).sort("timestamp", maintain_order=True)
    return base.Imported(
        events=events,
        items=_with_properties(items, known),
        catalog=_changes(known),
        rejected=pl.concat([rejected, *(aside for _, aside in read)]),
    )


def _properties(path: Path, scratch: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows of the properties that mean something to us, categoryid and available: the others are hashed; rejected)."""
    ours = pl.col("property").is_in(["categoryid", "available"])
    rows = pl.concat(batch.filter(ours) for batch in base.csv_batches(path, scratch, required=PROPERTY_COLUMNS))
    base.require(rows, path, PROPERTY_COLUMNS)
    rows = base.parse(rows, path, {"timestamp": base.epoch("timestamp", "ms")})
    rows, rejected = base.split(rows, path, {"bad_time": base.bad_time("timestamp")})
    return rows.select(base.event_ids(base.fingerprint(path)), *PROPERTY_COLUMNS), rejected


def _with_properties(items: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    described = known.group_by("itemid", maintain_order=True).agg(
        pl.col("timestamp").first().alias("described_from"),
        pl.col("value").filter(pl.col("property") == "categoryid").first().alias("category"),
    )
    whole = items.join(described, left_on="item_id", right_on="itemid", how="full", coalesce=True)
    earliest = pl.min_horizontal("available_from", "described_from")
    return whole.with_columns(available_from=earliest).drop("described_from")


def _changes(known: pl.DataFrame) -> pl.DataFrame:
    """catalog.parquet: only rows where availability changes, as the weekly snapshots repeat it."""
    available = known.filter(pl.col("property") == "available")
    changed = pl.col("value") != pl.col("value").shift(1).over("itemid")
    return available.filter(changed.fill_null(True)).select(
        "event_id",
        item_id=pl.col("itemid"),
        event_time=pl.col("timestamp"),
        kind=pl.when(pl.col("value") == "1").then(pl.lit("list")).otherwise(pl.lit("delist")),
    )


IMPORTER = base.Importer(format="retailrocket", licence="CC BY-NC-SA 4.0", read=_read)
