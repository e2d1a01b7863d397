"""New arrivals: items listed lately, the quickest starters first, then the untouched ones, newest first."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from recsys.candidates.behaviour import DAY_US, actions, daily_interest, half_life_us
from recsys.candidates.ranked_list import to_table
from recsys.core.items import ItemTable

NAME = "new_arrivals"
NEW_DAYS_MAX = 30.0


def build(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/new_arrivals.parquet: interest by user and day per day since the launch. Empty for a static catalogue."""
    log = actions(events, items, until_us)
    new_us = half_life_us(log, until_us, NEW_DAYS_MAX)
    age_us = until_us - pl.col("available_from")
    arrivals = pl.DataFrame(
        {"item_key": items.item_key, "available_from": items.column("available_from")},
        schema_overrides={"available_from": pl.Int64},
    ).filter((age_us > 0) & (age_us <= new_us))
    interest = daily_interest(log).group_by("item_key").agg(total=pl.col("weight").sum())
    velocity = pl.col("total").fill_null(0.0) / pl.max_horizontal(age_us / DAY_US, pl.lit(1.0))
    newest_first = 1e-3 * (1 - age_us / new_us)
    score = (velocity + newest_first).cast(pl.Float32)
    return to_table(arrivals.join(interest, on="item_key", how="left").select("item_key", score=score))
