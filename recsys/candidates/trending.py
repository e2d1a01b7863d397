"""Trending: what is wanted now more than it used to be."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from recsys.candidates.behaviour import actions, daily_interest, faded, half_life_us
from recsys.candidates.ranked_list import to_table
from recsys.core.items import ItemTable

NAME = "trending"
HALF_LIFE_DAYS_MAX = 3.5
LONG_TERM = 8.0  # the usual rate is measured over this many times the short half-life


def build(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/trending.parquet: decayed interest now, times log2(1 + its growth over the item's usual rate).

    Interest of a steady item decayed with half-life h is proportional to h, so the ratio of the two rates is 1 for it.
    """
    log = actions(events, items, until_us)
    short_us = half_life_us(log, until_us, HALF_LIFE_DAYS_MAX * LONG_TERM) / LONG_TERM
    rates = (
        daily_interest(log)
        .group_by("item_key")
        .agg(
            now=faded(until_us, short_us).sum(),
            usual=faded(until_us, short_us * LONG_TERM).sum() / LONG_TERM,
        )
    )
    smoothing = rates["usual"].to_numpy().mean() if len(rates) else 1.0  # an item seen once has not "grown" at all
    growth = (pl.col("now") + smoothing) / (pl.col("usual") + smoothing)
    score = (pl.col("now") * (1 + growth).log(2.0)).cast(pl.Float32)
    return to_table(rates.select("item_key", score=score))
