"""What is wanted, going on: interest since the run on top of the run's, for the lists that are made of it.

Interest is told by day, as the indexes count it: of one shopper's actions on an item on one day the strongest, at the
time of the last. Days before yesterday are over: an action that old is not counted any more.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from recsys.candidates.behaviour import DAY_US, sums
from recsys.candidates.ranked_list import read_table
from recsys.core import RunDirectory
from recsys.training.online.index import Keys, OnlineIndex, columns_of, remembered, table_in
from recsys.training.online.journal import Arrays

_DAYS = 2  # today's and yesterday's actions are remembered, so that none counts twice
_SHOWN = {"user": pl.Int64, "item_key": pl.Int64, "weight": pl.Float32, "time_us": pl.Int64}


class OnlineRates(OnlineIndex):
    """How much each item is wanted, by one or several memories of different length."""

    def __init__(
        self, run: RunDirectory, rows_max: int, users_max: int, schema: pa.Schema, half_life_us: Mapping[str, float]
    ) -> None:
        """users_max: shoppers told whose last two days are remembered; the one told longest ago is forgotten first.

        schema: of the run's file: item_key, and a sum of interest per memory. half_life_us: of each, by column.
        Raises: CorruptData for files of the run.
        """
        super().__init__(rows_max)
        self._users_max, self._from_us, self._until_us = users_max, run.until_us, run.until_us
        self._half_life_us = half_life_us
        of_run = pl.from_arrow(read_table(run.path(self.FILE), schema))
        assert isinstance(of_run, pl.DataFrame)
        self._rates = of_run.with_columns(at_us=pl.lit(run.until_us, pl.Int64))
        self._moved = set[int]()  # items that have other rates than in the run
        self._shown = pl.DataFrame(schema=_SHOWN)  # by shopper and item the last day; the shopper told last at the end

    def now(self) -> pl.DataFrame:
        """item_key and the sums as of the newest action, items ascending."""
        return self._as_of(self._rates, self._until_us)

    @abstractmethod
    def _rows_of(self, item_key: Keys) -> Keys:
        """Keys of the rows that these items' rates change, ascending."""

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
        return (
            columns_of("rates", rates)
            | columns_of("shown", shown)
            | {"waiting": self._rows_of(rates["item_key"].to_numpy())}
        )

    def _changed_by(self, change: pl.DataFrame, until_us: int) -> pl.DataFrame:
        """New rates as of `until_us`. change: item_key, interest (that taken back below 0), time_us."""
        left = {name: pl.col("weight") * _left(until_us, "time_us", h) for name, h in self._half_life_us.items()}
        added = sums(change, "item_key", **left)
        old = self._as_of(self._rates.filter(pl.col("item_key").is_in(added["item_key"].implode())), until_us)
        return (
            sums(pl.concat([old, added.select(old.columns)]), "item_key", **{n: pl.col(n) for n in self._half_life_us})
            .with_columns(pl.col(*self._half_life_us).clip(0.0), at_us=pl.lit(until_us, pl.Int64))
            .sort("item_key")
        )

    def _as_of(self, rates: pl.DataFrame, until_us: int) -> pl.DataFrame:
        faded = {name: pl.col(name) * _left(until_us, "at_us", h) for name, h in self._half_life_us.items()}
        return rates.select("item_key", **faded)

    def _hold(self, step: Arrays) -> None:
        rates = table_in(step, "rates", self._rates.schema)
        item_key = rates["item_key"]
        others = self._rates.filter(~pl.col("item_key").is_in(item_key.implode()))
        self._rates = pl.concat([others, rates]).sort("item_key")
        self._moved.update(item_key.to_list())
        self._until_us = max(self._until_us, int(step["rates.at_us"].max(initial=0)))
        recent = pl.col("time_us") > self._until_us - _DAYS * DAY_US
        shown = table_in(step, "shown", _SHOWN).filter(recent)
        self._shown = remembered(self._shown.filter(recent), shown, self._users_max)

    def _changed(self) -> Arrays:
        moved = pl.Series(sorted(self._moved), dtype=pl.Int64)
        rates = self._rates.filter(pl.col("item_key").is_in(moved.implode()))
        return columns_of("rates", rates) | columns_of("shown", self._shown)


def _left(until_us: int, since: str, half_life_us: float) -> pl.Expr:
    """What is left of one at `until_us`."""
    return (-(until_us - pl.col(since)) * math.log(2.0) / half_life_us).exp()
