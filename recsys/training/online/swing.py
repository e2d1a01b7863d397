"""Swing's links of a run, going on: who takes what since, and the rows of the index that this changes.

A row is made again whole, by the formula of the index, from all shoppers that it has, those of the run too. So it is
what a training at that moment would write, but for what its own shoppers have no part in: how many shoppers a neighbour
has, and how far links have faded, are those of when the row was made.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from recsys.candidates import swing
from recsys.candidates.covisit import config_of
from recsys.candidates.ranked_list import read_half_life_us, read_table
from recsys.candidates.rows import gather, rows_of
from recsys.core import RunDirectory
from recsys.core.ids import find_rows
from recsys.core.index_rows import IndexRows
from recsys.training.online.index import (
    Keys,
    OnlineIndex,
    columns_of,
    joined,
    remembered,
    rows_of_table,
    table_in,
)
from recsys.training.online.journal import Arrays

_SCHEMA = {"user": pl.Int64, "item_key": pl.Int64, "weight": pl.Float32, "time_us": pl.Int64}
_COLUMNS = tuple(_SCHEMA)
_ITEMS_AT_ONCE = 256  # bounds what is held at once: their shoppers, and all that these took


class OnlineSwing(OnlineIndex):
    """Who took what. A shopper's item that was beyond the newest, or one of whom the run left out, counts again."""

    NAME, FILE = swing.NAME, f"index/{swing.USERS}.parquet"

    def __init__(self, run: RunDirectory, rows_max: int, users_max: int) -> None:
        """users_max: shoppers told who are remembered; the one told longest ago is forgotten first, and what the run
        knows of that one stands again.

        Raises: CorruptData, VersionMismatch for files and settings of the run.
        """
        super().__init__(rows_max)
        self._config, self._users_max = config_of(run), users_max
        self._run = _Taken(read_table(run.path(self.FILE), swing.USERS_SCHEMA))
        self._half_life = read_half_life_us(run.path(self.FILE))
        self._until_us = run.until_us
        self._takers = pl.DataFrame(schema=_SCHEMA)  # rows of one shopper together, the one told last at the end
        self._num_users: dict[int, int] = {}  # of items that have other numbers than in the run

    def _told(self, user: Keys, item_key: Keys, interest: npt.NDArray[np.float32], time_us: Keys) -> Arrays:
        rows = pl.DataFrame([user, item_key, np.sqrt(np.sqrt(interest)), time_us], schema=_SCHEMA)
        old = self._of_users(rows["user"].unique().to_numpy())
        new = (
            pl.concat([old, rows])
            .group_by("user", "item_key")
            .agg(pl.col("weight").max(), pl.col("time_us").max())
            .sort(["user", "time_us", "item_key"], descending=[False, True, False])
            .group_by("user", maintain_order=True)
            .head(self._config.user_items_max)
        )
        users = new.join(old, on=_COLUMNS, how="anti")["user"].unique().sort()
        old, new = (rows.filter(pl.col("user").is_in(users.implode())) for rows in (old, new))
        added = new.join(old, on=["user", "item_key"], how="anti").group_by("item_key").len().sort("item_key")
        item = added["item_key"].to_numpy()
        return columns_of("taken", new) | {
            "users.item_key": item,
            "users.num": self._users_of(item) + added["len"].to_numpy().astype(np.int64),
            "waiting": np.union1d(old["item_key"].to_numpy(), new["item_key"].to_numpy()),
        }

    def _hold(self, step: Arrays) -> None:
        self._takers = remembered(self._takers, table_in(step, "taken", _SCHEMA), self._users_max)
        self._until_us = max(self._until_us, int(step["taken.time_us"].max(initial=0)))
        self._num_users |= dict(zip(step["users.item_key"].tolist(), step["users.num"].tolist(), strict=True))

    def _changed(self) -> Arrays:
        return columns_of("taken", self._takers) | {
            "users.item_key": np.fromiter(self._num_users, np.int64, len(self._num_users)),
            "users.num": np.fromiter(self._num_users.values(), np.int64, len(self._num_users)),
        }

    def _made(self, wanted: Keys) -> IndexRows:
        some = (wanted[at : at + _ITEMS_AT_ONCE] for at in range(0, len(wanted), _ITEMS_AT_ONCE))
        return joined([self._links(np.sort(item_key)) for item_key in some])

    def _links(self, item_key: Keys) -> IndexRows:
        newest = (
            self._of_items(item_key)
            .filter(pl.col("num_items") > 1)
            .sort(["item_key", "time_us", "user"], descending=[False, True, False])
            .group_by("item_key", maintain_order=True)
            .head(self._config.item_users_max)
        )
        taken = self._of_users(newest["user"].unique().to_numpy())
        items = taken["item_key"].unique()
        num_users = pl.DataFrame({"item_key": items, "num_users": self._users_of(items.to_numpy())})
        taken = taken.join(num_users, on="item_key")
        table = swing.links(taken, self._until_us, self._half_life, self._config, item_key)
        owner, neighbour, score = (table.column(name).to_numpy() for name in table.column_names)
        return rows_of_table(item_key, owner, neighbour, score)

    def _of_users(self, user: Keys) -> pl.DataFrame:
        """All that these shoppers took."""
        told = self._takers.filter(pl.col("user").is_in(pl.Series(user).implode()))
        return pl.concat([told, self._run.of_users(np.setdiff1d(user, told["user"].to_numpy()))])

    def _of_items(self, item_key: Keys) -> pl.DataFrame:
        """Who took these items, and how many items each of them has."""
        of_user = pl.len().over("user").cast(pl.Int64).alias("num_items")
        told = self._takers.with_columns(of_user).filter(pl.col("item_key").is_in(pl.Series(item_key).implode()))
        held = self._run.of_items(item_key)
        return pl.concat([told, held.filter(~pl.col("user").is_in(self._takers["user"].implode()))])

    def _users_of(self, item_key: Keys) -> Keys:
        """How many shoppers took each item [R]."""
        told = (self._num_users.get(one, -1) for one in item_key.tolist())
        number = np.fromiter(told, np.int64, len(item_key))
        return np.where(number >= 0, number, self._run.num_users(item_key))


class _Taken:
    """What the run knows, by shopper and by item."""

    def __init__(self, table: pa.Table) -> None:
        """table: USERS_SCHEMA, a shopper's rows together, shoppers ascending."""
        user, item = table.column("user_key").to_numpy(), table.column("item_key").to_numpy()
        self._user, user_at, num = np.unique(user, return_index=True, return_counts=True)
        self._user_at = np.append(user_at, len(user))
        self._by_item = np.argsort(item, kind="stable")
        self._item, item_at = np.unique(item[self._by_item], return_index=True)
        self._item_at = np.append(item_at, len(item))
        self._num_users = np.append(table.column("num_users").to_numpy()[self._by_item][item_at], 0)
        columns = [table.column(name).to_numpy() for name in ("user_key", *_COLUMNS[1:])]
        self._rows = pl.DataFrame([*columns, np.repeat(num, num)], schema={**_SCHEMA, "num_items": pl.Int64})

    def of_users(self, user: Keys) -> pl.DataFrame:
        """All that these took."""
        row, _ = rows_of(self._user, user)
        return self._rows[gather(self._user_at, row)[0]].select(_COLUMNS)

    def of_items(self, item_key: Keys) -> pl.DataFrame:
        """Who took these, and how many items each of them has."""
        row, _ = rows_of(self._item, item_key)
        return self._rows[self._by_item[gather(self._item_at, row)[0]]]

    def num_users(self, item_key: Keys) -> Keys:
        """Of each item [R], 0 of one that nobody took."""
        found: Keys = self._num_users[find_rows(self._item, item_key)]
        return found
