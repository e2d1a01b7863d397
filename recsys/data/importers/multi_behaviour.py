"""multi-behaviour: CSV user_id,item_id,behavior,timestamp (seconds), as many preprocessed public logs have it."""

from __future__ import annotations

import polars as pl

from recsys.data.importers import base

COLUMNS = ("user_id", "item_id", "behavior", "timestamp")
BEHAVIOURS = {
    "pv": "view", "click": "view", "view": "view", "fav": "favorite", "favorite": "favorite", "collect": "favorite",
    "cart": "cart", "addtocart": "cart", "buy": "purchase", "purchase": "purchase", "transaction": "purchase",
}  # fmt: skip


def behaviour(column: str) -> tuple[pl.Expr, str]:
    """Parser of the public logs' words for what a shopper did."""
    known = pl.col(column).replace_strict(BEHAVIOURS, default=None, return_dtype=pl.String)
    return known, f"one of {', '.join(BEHAVIOURS)}"


def _read(source: base.Source) -> base.Imported:
    path = source.find("interactions.csv", "interactions.csv.gz", "*.csv", "*.csv.gz")
    rows = base.read_csv(path, source.scratch, required=COLUMNS)
    base.require(rows, path, COLUMNS)
    rows = base.parse(rows, path, {"behavior": behaviour("behavior"), "timestamp": base.epoch("timestamp", "s")})
    rows, rejected = base.split(rows, path, {"bad_id": base.bad_ids(), "bad_time": base.bad_time("timestamp")})
    events = rows.select(
        base.event_ids(base.fingerprint(path)),
        "user_id",
        "item_id",
        event_type=pl.col("behavior"),
        event_time=pl.col("timestamp"),
    ).sort("event_time", maintain_order=True)
    return base.Imported(events=events, items=base.items_from_events(events), rejected=rejected)


IMPORTER = base.Importer(format="multi-behaviour", licence="that of the source log", read=_read)
