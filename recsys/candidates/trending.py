"""Trending: what is wanted now more than it used to be, everywhere and in the categories that a shopper is in.

Shape legend: L rows of the lists, C categories, N items of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from feature_store import UserFeatures
from recsys.candidates.behaviour import actions, daily_interest, faded, half_life_us, sums, touched
from recsys.candidates.linked import Memory, seeds
from recsys.candidates.own_history import best_first
from recsys.candidates.ranked_list import read_table, to_table, with_half_life
from recsys.candidates.rows import FreshRows, RowTable, newer_rows
from recsys.core import Candidates, Deadline, Query, keys
from recsys.core.attributes import name_keys
from recsys.core.items import ItemTable

NAME, RATES = "trending", "trending_rates"
HALF_LIFE_DAYS_MAX = 3.5
LONG_TERM = 8.0  # the usual rate is measured over this many times the short half-life
EVERYWHERE = 0  # the key of no category: the list of the whole shop
CATEGORY_ITEMS_MAX = 100
USER_CATEGORIES_MAX = 8  # of a shopper, the strongest: bounds what a request costs
MEMORY = Memory(items_max=50, half_life_days=15.0)
SCHEMA = pa.schema(
    [
        pa.field("category_key", pa.int64(), nullable=False),
        pa.field("item_key", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
RATES_SCHEMA = pa.schema(
    [
        pa.field("item_key", pa.int64(), nullable=False),
        pa.field("now", pa.float64(), nullable=False),
        pa.field("usual", pa.float64(), nullable=False),
    ]
)
Keys = npt.NDArray[np.int64]


def build(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/trending.parquet: lists by category key, best first; EVERYWHERE is of all items, with or without category.

    An item's interest: decayed interest now, times log2(1 + its growth over the item's usual rate). Interest of a
    steady item decayed with half-life h is proportional to h, so the ratio of the two rates is 1 for it. The score is
    relative to the best of the shop; in a category to its best and the mean of the shop's items, so that the best of a
    category in which hardly anything happens is none.
    """
    log = actions(events, items, until_us)
    return lists(_rates(log, until_us, _short_us(log, until_us)), items)


def build_rates(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/trending_rates.parquet: what lists are made from when more is wanted; RATES_SCHEMA, as of `until_us`."""
    log = actions(events, items, until_us)
    short_us = _short_us(log, until_us)
    table = _rates(log, until_us, short_us).select(RATES_SCHEMA.names).to_arrow().cast(RATES_SCHEMA)
    return with_half_life(table, short_us)


def lists(rates: pl.DataFrame, items: ItemTable) -> pa.Table:
    """The lists, SCHEMA. rates: item_key, now, usual (sums of `build_rates`) of each item, items ascending."""
    rates = rates.with_columns(pl.col("usual") / LONG_TERM)  # a short half-life's worth
    smoothing = rates["usual"].to_numpy().mean() if len(rates) else 1.0  # an item seen once has not "grown" at all
    growth = (pl.col("now") + smoothing) / (pl.col("usual") + smoothing)
    score = (pl.col("now") * (1 + growth).log(2.0)).cast(pl.Float32)
    scored = rates.select("item_key", score=score)
    everywhere = to_table(scored)
    made = pl.concat([_of_shop(everywhere), _by_category(scored, items)]).sort("category_key", maintain_order=True)
    return made.select(SCHEMA.names).to_arrow().cast(SCHEMA)


def _short_us(log: pl.DataFrame, until_us: int) -> float:
    """Half-life of what counts as now."""
    return half_life_us(log, until_us, HALF_LIFE_DAYS_MAX * LONG_TERM) / LONG_TERM


def _rates(log: pl.DataFrame, until_us: int, short_us: float) -> pl.DataFrame:
    now, usual = faded(until_us, short_us), faded(until_us, short_us * LONG_TERM)
    return sums(daily_interest(log), "item_key", now=now, usual=usual).sort("item_key")


def _of_shop(everywhere: pa.Table) -> pl.DataFrame:
    columns = {name: everywhere.column(name).to_numpy() for name in everywhere.column_names}
    return pl.DataFrame({"category_key": np.full(everywhere.num_rows, EVERYWHERE, np.int64), **columns})


def _by_category(scored: pl.DataFrame, items: ItemTable) -> pl.DataFrame:
    """The best CATEGORY_ITEMS_MAX of each category, best first, ties by key."""
    category_key = name_keys(items.column("category"))
    of_item = pl.DataFrame({"item_key": items.item_key, "category_key": category_key})
    mean = scored["score"].to_numpy().mean() if len(scored) else 0.0
    return (
        scored.join(of_item.filter(pl.col("category_key") != EVERYWHERE), on="item_key")
        .filter(pl.col("score") > 0)
        .sort(["category_key", "score", "item_key"], descending=[False, True, False])
        .group_by("category_key", maintain_order=True)
        .head(CATEGORY_ITEMS_MAX)
        .with_columns(score=(pl.col("score") / (pl.col("score").max().over("category_key") + mean)).cast(pl.Float32))
        .select("category_key", "item_key", "score")
    )


class Trending:
    """Implements CandidateSource. Score = the item's in the shop, plus that in its category times the shopper's share.

    Share: of the shopper's newest actions, older ones counting less, those in the category; 1 for a category that the
    request asks for. Who has done nothing in any category gets the list of the shop.
    """

    name = NAME

    def __init__(self, table: pa.Table, category_of: Callable[[Keys], Keys], fresh: FreshRows | None = None) -> None:
        """table: SCHEMA, by category_key, best first. category_of: key of the category of items [N], 0 = none.

        fresh: lists that stand in place of the table's.
        """
        self._lists = RowTable(table, newer_rows(fresh, NAME))
        self._category_of = category_of

    @classmethod
    def read(cls, path: Path, category_of: Callable[[Keys], Keys], fresh: FreshRows | None = None) -> Trending:
        """From an index file. Raises: CorruptData."""
        return cls(read_table(path, SCHEMA), category_of, fresh)

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """What is trending in the shop and in the shopper's categories, best first."""
        item_key, share = self._lists.weighted(*self._interest(query, user))
        found, at = np.unique(item_key, return_inverse=True)
        score = np.bincount(at, share, len(found)).astype(np.float32)
        if query.new_only:
            fresh = ~np.isin(found, touched(user))
            found, score = found[fresh], score[fresh]
        rows = best_first(found, score, limit)
        return Candidates.from_source(self.name, found[rows], score[rows])

    def _interest(self, query: Query, user: UserFeatures) -> tuple[Keys, npt.NDArray[np.float64]]:
        """Lists to merge [C] and how much each counts; one may be named twice, for two reasons."""
        seed_key, seed_weight = seeds(query, user, MEMORY)
        own, at = np.unique(self._category_of(seed_key), return_inverse=True)
        share = np.bincount(at, seed_weight, len(own)) / max(float(seed_weight.sum()), 1e-12)
        own, share = own[own != EVERYWHERE], share[own != EVERYWHERE]
        strongest = best_first(own, share.astype(np.float32), USER_CATEGORIES_MAX)
        asked = keys(sorted(query.where.categories or ()))
        category = np.concatenate([[EVERYWHERE], own[strongest], asked]).astype(np.int64)
        return category, np.concatenate([[1.0], share[strongest], np.ones(len(asked))])
