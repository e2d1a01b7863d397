"""Text-similar: items whose titles share rare words with the user's past. Works for items nobody has touched.

Source: tf-idf with cosine similarity (Manning et al., "Introduction to Information Retrieval", sections 6.2 and 6.3).
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from recsys.candidates.linked import SCHEMA, Memory
from recsys.core.items import ItemTable

NAME = "text_similar"
MEMORY = Memory(half_life_days=60.0, step_decay=0.9)
NEIGHBOURS_MAX = 48
WORD_ITEMS_MAX = 200  # a word that more items share says little, and costs its square
_PAIRS_MAX = 2_000_000  # of items and a word of both, held at a time: a bound of memory, some 700 MB


def build(_events: pl.DataFrame, items: ItemTable, _until_us: int) -> pa.Table:
    """index/text_similar.parquet: per item the items with the most similar titles. Empty where there are no titles."""
    titles = pl.DataFrame(
        {"item_key": items.item_key, "title": items.column("title")}, schema_overrides={"title": pl.String}
    )
    words = (
        titles.drop_nulls()
        .select("item_key", word=pl.col("title").str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+"))
        .explode("word")
        .drop_nulls()
        .unique(maintain_order=True)
    )
    if words.is_empty():
        return SCHEMA.empty_table()
    weighted = words.with_columns(
        items=pl.len().over("word"), weight=(len(items) / pl.len().over("word")).log().cast(pl.Float64)
    ).with_columns(weight=pl.col("weight") / (pl.col("weight") ** 2).sum().over("item_key").sqrt().clip(1e-9))
    telling = (
        weighted.filter(pl.col("items").is_between(2, WORD_ITEMS_MAX))
        .sort("item_key", maintain_order=True)
        .select("item_key", "weight", word=pl.col("word").rank("dense"), pairs=pl.col("items").cast(pl.Int64).cum_sum())
        .with_columns(block=pl.col("pairs").max().over("item_key") // _PAIRS_MAX)
    )
    if telling.is_empty():
        return SCHEMA.empty_table()
    others = telling.select("word", neighbour_key="item_key", other="weight")
    blocks = telling.select("item_key", "weight", "word", "block").partition_by("block", maintain_order=True)
    return pl.concat([_nearest(block, others) for block in blocks], rechunk=True).to_arrow().cast(SCHEMA)


def _nearest(words: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
    """The rows of some items: by item, the most similar first."""
    return (
        words.join(others, on="word")
        .filter(pl.col("item_key") != pl.col("neighbour_key"))
        .group_by("item_key", "neighbour_key")
        .agg(score=(pl.col("weight") * pl.col("other")).sort().sum().round(6).cast(pl.Float32))
        .filter(pl.col("score") > 0)
        .sort(["item_key", "score", "neighbour_key"], descending=[False, True, False])
        .group_by("item_key", maintain_order=True)
        .head(NEIGHBOURS_MAX)
        .select(SCHEMA.names)
    )
