"""User-kNN: what the shoppers most like this one took lately.

Shape legend: R user-item rows, U users, S seeds.
Source: Hu et al., "Modeling personalized item frequency information for next-basket recommendation" (SIGIR 2020),
section 4.2 (neighbours' vectors); cosine similarity of vectors that fade with time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from feature_store import UserFeatures
from recsys.candidates.behaviour import actions, faded, half_life_us, touched
from recsys.candidates.linked import Memory, seeds
from recsys.candidates.own_history import best_first
from recsys.candidates.ranked_list import read_table
from recsys.candidates.rows import gather, rows_of
from recsys.core import Candidates, Deadline, Query, key, keys
from recsys.core.items import ItemTable

NAME = "user_knn"
MEMORY = Memory(half_life_days=60.0)
SCHEMA = pa.schema(
    [
        pa.field("user_key", pa.int64(), nullable=False),
        pa.field("item_key", pa.int64(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)
USERS_MAX = 200_000  # the newest
USER_ITEMS_MAX = 100
ITEM_USERS_MAX = 400  # of an item, the newest: bounds what one seed costs
NEIGHBOURS = 150
HALF_LIFE_DAYS_MAX = 60.0


def build(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/user_knn.parquet: users as unit vectors of their newest items, weights faded to `until_us`."""
    log = actions(events, items, until_us)
    half_life = half_life_us(log, until_us, HALF_LIFE_DAYS_MAX)
    rows = (
        log.group_by("user_id", "item_key")
        .agg(weight=pl.col("weight").max().sqrt(), time_us=pl.col("time_us").max())
        .with_columns(weight=faded(until_us, half_life), newest=pl.col("time_us").max().over("user_id"))
        .sort(["newest", "user_id", "time_us", "item_key"], descending=[True, False, True, False])
        .group_by("user_id", maintain_order=True)
        .head(USER_ITEMS_MAX)
        .filter(pl.col("user_id").rle_id() < USERS_MAX)
        .with_columns(weight=pl.col("weight") / (pl.col("weight") ** 2).sum().over("user_id").sqrt().clip(1e-12))
    )
    distinct = rows["user_id"].unique(maintain_order=True)
    of_user = pl.DataFrame({"user_id": distinct, "user_key": keys(distinct)})
    return (
        rows.join(of_user, on="user_id", how="left", maintain_order="left")
        .select("user_key", "item_key", pl.col("weight").cast(pl.Float32))
        .to_arrow()
        .cast(SCHEMA)
    )


class UserKnn:
    """Implements CandidateSource: similarity-weighted mean of the neighbours' vectors, the user's own left out."""

    name = NAME

    def __init__(self, table: pa.Table) -> None:
        """table: SCHEMA, rows of one user together, users newest first."""
        user_key = table.column("user_key").to_numpy()
        self._item = table.column("item_key").to_numpy()
        self._weight = table.column("weight").to_numpy()
        first = np.flatnonzero(np.append(True, user_key[1:] != user_key[:-1])) if len(user_key) else np.empty(0, int)
        self._user_key = user_key[first]
        self._start = np.append(first, len(user_key))
        user = np.repeat(np.arange(len(first)), np.diff(self._start))
        order = np.argsort(self._item, kind="stable")  # users stay newest first within an item
        self._item_key, begin, count = np.unique(self._item[order], return_index=True, return_counts=True)
        kept = np.arange(len(order)) - np.repeat(begin, count) < ITEM_USERS_MAX
        self._holder, self._held = user[order][kept], self._weight[order][kept]
        self._item_start = np.append(0, np.cumsum(np.minimum(count, ITEM_USERS_MAX)))

    @classmethod
    def read(cls, path: Path) -> UserKnn:
        """From an index file. Raises: CorruptData."""
        return cls(read_table(path, SCHEMA))

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """What the neighbours have, best first; none for a newcomer without a cart."""
        near, like = self._neighbours(query, user)
        edge, count = gather(self._start, near)
        found, at = np.unique(self._item[edge], return_inverse=True)
        weight = self._weight[edge] * np.repeat(like, count) / max(float(like.sum()), 1e-12)
        score = np.bincount(at, weight, minlength=len(found)).astype(np.float32)
        if query.new_only:
            fresh = ~np.isin(found, touched(user))
            found, score = found[fresh], score[fresh]
        rows = best_first(found, score, limit)
        return Candidates.from_source(self.name, found[rows], score[rows])

    def _neighbours(self, query: Query, user: UserFeatures) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        seed_key, weight = seeds(query, user, MEMORY)
        row, known = rows_of(self._item_key, seed_key)
        edge, count = gather(self._item_start, row)
        weight = weight[known] / max(float(np.sqrt((weight**2).sum())), 1e-12)
        held = self._held[edge] * np.repeat(weight, count)
        like = np.bincount(self._holder[edge], held, len(self._user_key)).astype(np.float64)
        like[self._user_key == key(query.user_id)] = 0.0
        near = np.flatnonzero(like > 0)
        near = near[np.argsort(-like[near], kind="stable")[:NEIGHBOURS]].astype(np.int64)
        return near, like[near]
