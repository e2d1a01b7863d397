"""The items of an archive: all that were listed or acted on, as first known.

Every flush adds what it has seen of its sources' items, `items/SOURCE-FIRST-LAST.parquet`, durable before the coverage
of those offsets is: so the union of all parts has every item of every covered event, whoever wrote which part, and no
worker waits for another's. Parts of a source are merged as day files are (see tidy.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

from streaming.archive.files import ITEMS, found, split

_TEXT = ("title", "category", "brand", "price", "attributes")
_SCHEMA = {
    "item_id": pl.String,
    "available_from": pl.Datetime("us", "UTC"),
    "listed": pl.Boolean,
    **{c: pl.Int64 if c == "price" else pl.String for c in _TEXT},
}


def seen(by_folder: Mapping[str, pl.DataFrame]) -> Iterator[tuple[str, pl.DataFrame]]:
    """Of the rows of a flush, by source, the items in them as first known (columns as `read_items`)."""
    parts = [_rows(folder, by_folder[folder]) for folder in ("changes", "events") if folder in by_folder]
    for (source,), rows in pl.concat(parts).group_by("source", maintain_order=True) if parts else ():
        yield str(source), first_known(rows.drop("source"))


def first_known(rows: pl.DataFrame) -> pl.DataFrame:
    """Of several sightings of an item the earliest listing, else the earliest action; texts as first known."""
    rows = rows.sort(pl.col("listed").not_(), "available_from", maintain_order=True)
    texts = (pl.col(c).drop_nulls().first() for c in _TEXT)
    return rows.group_by("item_id").agg(pl.col("available_from", "listed").first(), *texts).sort("item_id")


def read_items(root: Path) -> pl.DataFrame:
    """item_id, available_from, listed (else only acted on), title, category, brand, price, attributes; by item_id."""
    whole, _ = split(found(root, ITEMS))
    parts = (pl.read_parquet(p, columns=list(_SCHEMA), hive_partitioning=False) for p in whole)
    return first_known(pl.concat([pl.DataFrame(schema=_SCHEMA), *parts]))


def _rows(folder: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Sightings: listings with their texts, or actions."""
    if folder == "events":
        rows = rows.with_columns(pl.lit(None, _SCHEMA[c]).alias(c) for c in _TEXT).with_columns(listed=pl.lit(False))
    else:
        rows = rows.filter("listed")
    return rows.rename({"event_time": "available_from"}).select("source", *_SCHEMA)
