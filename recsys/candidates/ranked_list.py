"""A source that gives everybody the same list: popular and new arrivals are its two uses.

The index is a table (item_key, score), best first, ties by key; 1.0 is the best, so that scores of different days, and
of runs on more or less data, mean the same to a ranker.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store import UserFeatures
from recsys.candidates.behaviour import touched
from recsys.core import Candidates, CorruptData, Deadline, Query

SCHEMA = pa.schema([pa.field("item_key", pa.int64(), nullable=False), pa.field("score", pa.float32(), nullable=False)])
LIST_ITEMS_MAX = 2_000


def to_table(scored: pl.DataFrame) -> pa.Table:
    """The index table of the best LIST_ITEMS_MAX rows of (item_key, score > 0), relative to the best."""
    best = scored.sort(["score", "item_key"], descending=[True, False]).head(LIST_ITEMS_MAX)
    score = best["score"].to_numpy().astype(np.float32)
    return pa.table([best["item_key"].to_numpy(), score / score.max(initial=np.float32(1e-30))], schema=SCHEMA)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read an index file of a run.

    Raises: CorruptData when it is no Parquet or has other columns than `schema`.
    """
    try:
        return pq.read_table(path).select(schema.names).cast(schema)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        fix = "Train again, or copy the run directory whole."
        raise CorruptData(str(path), came=str(error), expected=f"Parquet with {schema.names}", fix=fix) from error


class RankedList:
    """Implements CandidateSource over one list."""

    def __init__(self, name: str, item_key: npt.NDArray[np.int64], score: npt.NDArray[np.float32]) -> None:
        """item_key [M], score [M]: distinct items, best first."""
        self.name, self.item_key, self.score = name, item_key, score

    @classmethod
    def read(cls, name: str, path: Path) -> RankedList:
        """From an index file. Raises: CorruptData."""
        table = read_table(path, SCHEMA)
        return cls(name, table.column("item_key").to_numpy(), table.column("score").to_numpy())

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """The head of the list."""
        return self.head(query, user, limit)

    def head(self, query: Query, user: UserFeatures, limit: int) -> Candidates:
        """The first `limit` items, without what the user has touched when the query wants only new ones."""
        keys, score = self.item_key, self.score
        if query.new_only:
            fresh = ~np.isin(keys, touched(user))
            keys, score = keys[fresh], score[fresh]
        return Candidates.from_source(self.name, keys[:limit], score[:limit])
