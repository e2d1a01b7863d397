"""Popular: what many shoppers wanted lately. Also the last tier, for when nothing else answers."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from recsys.candidates.behaviour import actions, daily_interest, faded, half_life_us
from recsys.candidates.ranked_list import to_table
from recsys.core.items import ItemTable

NAME = "popular"
HALF_LIFE_DAYS_MAX = 14.0


def build(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/popular.parquet: interest by user and day, exponentially decayed to `until_us`."""
    log = actions(events, items, until_us)
    half_life = half_life_us(log, until_us, HALF_LIFE_DAYS_MAX)
    score = faded(until_us, half_life).sum().cast(pl.Float32)
    return to_table(daily_interest(log).group_by("item_key").agg(score=score))
