"""What is trending, going on: interest since the run on top of the run's, and the lists that this changes.

Interest is told by day, as the index counts it: of one shopper's actions on an item on one day the strongest, at the
time of the last. Days before yesterday are over: an action that old is not counted any more.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.candidates import trending
from recsys.candidates.behaviour import DAY_US
from recsys.candidates.ranked_list import read_table
from recsys.core import RunDirectory
from recsys.core.attributes import name_keys
from recsys.core.index_rows import IndexRows
from recsys.core.items import ItemTable
from recsys.training.online.index import Keys, OnlineIndex, half_life_in, joined, rows_of_table
from recsys.training.online.journal import Arrays

_DAYS = 2  # today's and yesterday's actions are remembered, so that none counts twice
_RATES = {"item_key": pl.Int64, "now": pl.Float64, "usual": pl.Float64, "at_us": pl.Int64}
_SHOWN = {"user": pl.Int64, "item_key": pl.Int64, "weight": pl.Float32, "time_us": pl.Int64}


class OnlineTrending(OnlineIndex):
    """How much each item is wanted now and usually. The list of the whole shop is made in every step with actions."""

    NAME, FILE = trending.NAME, f"index/{trending.RATES}.parquet"

    def __init__(self, run: RunDirectory, rows_max: int, users_max: int) -> None:
        """users_max: shoppers told whose last two days are remembered; the one told longest ago is forgotten first.

        Raises: CorruptData for files of the run.
        """
        super().__init__(rows_max)
        self._users_max, self._until_us = users_max, run.until_us
        self._from_us = run.until_us
        self._short_us = half_life_in(run, self.FILE, trending.HALF_LIFE)
        self._items = ItemTable.read(run.path("items.parquet"))
        self._category_key = np.append(name_keys(self._items.column("category")), trending.EVERYWHERE)
        of_run = pl.from_arrow(read_table(run.path(self.FILE), trending.RATES_SCHEMA))
        assert isinstance(of_run, pl.DataFrame)
        self._rates = of_run.with_columns(at_us=pl.lit(run.until_us, pl.Int64))
        self._moved = set[int]()  # items that have other rates than in the run
        self._shown = pl.DataFrame(schema=_SHOWN)  # by shopper and item the last day; the shopper told last at the end

    def _told(self, user: Keys, item_key: Keys, interest: npt.NDArray[np.float32], time_us: Keys) -> Arrays:
        rows = pl.DataFrame([user, item_key, interest, time_us], schema=_SHOWN)
        until_us = max(self._until_us, int(time_us.max(initial=0)))
        known = self._shown.filter(pl.col("user").is_in(rows["user"].unique().implode()))
        day = (pl.col("time_us") // DAY_US).alias("day")
        before = known.group_by("user").agg(last_us=pl.col("time_us").max())
        new = (
            rows.join(before, on="user", how="left")
            .filter(pl.col("time_us") >= pl.col("last_us").fill_null(self._from_us))  # of one basket, some may be new
            .filter(pl.col("time_us") > until_us - _DAYS * DAY_US)
            .group_by("user", "item_key", day)
            .agg(pl.col("weight").max(), pl.col("time_us").max())
            .join(known.with_columns(day), on=["user", "item_key", "day"], how="left", suffix="_before")
            .with_columns(weight=pl.max_horizontal("weight", "weight_before"))
            .filter(
                ~pl.col("weight").eq_missing(pl.col("weight_before"))
                | ~pl.col("time_us").eq_missing(pl.col("time_us_before"))
            )
            .sort("user", "item_key", "day")
        )
        counted = new.filter(pl.col("weight_before").is_not_null())
        change = pl.concat(
            [
                new.select("item_key", pl.col("weight").cast(pl.Float64), "time_us"),
                counted.select("item_key", weight=-pl.col("weight_before").cast(pl.Float64), time_us="time_us_before"),
            ]
        )
        rates = self._changed_by(change, until_us)
        last = new.group_by("user", "item_key", maintain_order=True).last().select(*_SHOWN)
        kept = known.join(last, on=["user", "item_key"], how="anti")
        shown = pl.concat([kept, last]).sort("user", "time_us", "item_key")
        category = np.unique(self._category_key[self._items.rows(rates["item_key"].to_numpy())])
        return {f"rates.{name}": rates[name].to_numpy() for name in _RATES} | {
            f"shown.{name}": shown[name].to_numpy() for name in _SHOWN
        } | {"waiting": category[category != trending.EVERYWHERE]}  # fmt: skip

    def _changed_by(self, change: pl.DataFrame, until_us: int) -> pl.DataFrame:
        """New rates as of `until_us`. change: item_key, interest (that taken back below 0), time_us."""
        age = (until_us - pl.col("time_us")) * math.log(2.0) / self._short_us
        added = change.group_by("item_key", maintain_order=True).agg(  # sums depend on the order
            now=(pl.col("weight") * (-age).exp()).sum(),
            usual=(pl.col("weight") * (-age / trending.LONG_TERM).exp()).sum() / trending.LONG_TERM,
        )
        old = self._as_of(self._rates.filter(pl.col("item_key").is_in(added["item_key"].implode())), until_us)
        return (
            pl.concat([old, added.select(old.columns)])
            .group_by("item_key", maintain_order=True)
            .agg(pl.col("now", "usual").sum().clip(0.0))
            .with_columns(at_us=pl.lit(until_us, pl.Int64))
            .sort("item_key")
        )

    def _as_of(self, rates: pl.DataFrame, until_us: int) -> pl.DataFrame:
        age = (until_us - pl.col("at_us")) * math.log(2.0) / self._short_us
        return rates.select(
            "item_key", now=pl.col("now") * (-age).exp(), usual=pl.col("usual") * (-age / trending.LONG_TERM).exp()
        )

    def _hold(self, step: Arrays) -> None:
        rates = pl.DataFrame({name: step[f"rates.{name}"] for name in _RATES}, schema=_RATES)
        item_key = rates["item_key"]
        others = self._rates.filter(~pl.col("item_key").is_in(item_key.implode()))
        self._rates = pl.concat([others, rates]).sort("item_key")
        self._moved.update(item_key.to_list())
        shown = pl.DataFrame({name: step[f"shown.{name}"] for name in _SHOWN}, schema=_SHOWN)
        self._until_us = max(self._until_us, int(step["rates.at_us"].max(initial=0)))
        shown = pl.concat([self._shown.filter(~pl.col("user").is_in(shown["user"].implode())), shown])
        shown = shown.filter(pl.col("time_us") > self._until_us - _DAYS * DAY_US)
        user = shown["user"].rle_id().to_numpy().astype(np.int64)
        self._shown = shown.filter(user > user.max(initial=0) - self._users_max)

    def _changed(self) -> Arrays:
        rates = self._rates.filter(pl.col("item_key").is_in(pl.Series(sorted(self._moved), dtype=pl.Int64).implode()))
        return {f"rates.{name}": rates[name].to_numpy() for name in _RATES} | {
            f"shown.{name}": self._shown[name].to_numpy() for name in _SHOWN
        }  # fmt: skip

    def _made(self, wanted: Keys) -> IndexRows:
        if not len(wanted) and not len(self._step["rates.item_key"]):
            return joined([])
        key = np.unique(np.append(wanted, trending.EVERYWHERE))
        table = trending.lists(self._as_of(self._rates, self._until_us), self._items)
        owner, item_key, score = (table.column(name).to_numpy() for name in trending.SCHEMA.names)
        some = np.isin(owner, key)
        return rows_of_table(key, owner[some], item_key[some], score[some])
