"""Popular: what many shoppers wanted lately. Also the last tier, for when nothing else answers."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from recsys.candidates.behaviour import actions, daily_interest, faded, half_life_us, sums
from recsys.candidates.ranked_list import to_table, with_half_life
from recsys.core.items import ItemTable

NAME, RATES = "popular", "popular_rates"
HALF_LIFE_DAYS_MAX = 14.0
RATES_SCHEMA = pa.schema(
    [pa.field("item_key", pa.int64(), nullable=False), pa.field("interest", pa.float64(), nullable=False)]
)


def build(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/popular.parquet: interest by user and day, exponentially decayed to `until_us`."""
    log = actions(events, items, until_us)
    return best(_rates(log, until_us, half_life_us(log, until_us, HALF_LIFE_DAYS_MAX)))


def build_rates(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/popular_rates.parquet: what the list is made from when more is wanted; RATES_SCHEMA, as of `until_us`."""
    log = actions(events, items, until_us)
    half_life = half_life_us(log, until_us, HALF_LIFE_DAYS_MAX)
    rates = _rates(log, until_us, half_life).sort("item_key")
    table = rates.select(RATES_SCHEMA.names).to_arrow().cast(RATES_SCHEMA)
    return with_half_life(table, half_life)


def best(rates: pl.DataFrame) -> pa.Table:
    """The list, ranked_list.SCHEMA. rates: item_key, interest."""
    return to_table(rates.select("item_key", score=pl.col("interest").cast(pl.Float32)))


def _rates(log: pl.DataFrame, until_us: int, half_life: float) -> pl.DataFrame:
    return sums(daily_interest(log), "item_key", interest=faded(until_us, half_life))
