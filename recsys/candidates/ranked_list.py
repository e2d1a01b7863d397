"""A source that gives everybody the same list: popular and new arrivals are its two uses.

The index is a table (item_key, score), best first, ties by key; 1.0 is the best, so that scores of different days, and
of runs on more or less data, mean the same to a ranker.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store import UserFeatures
from recsys.candidates.behaviour import touched
from recsys.candidates.rows import FreshRows, Row, newer_rows
from recsys.core import Candidates, CorruptData, Deadline, Query

SCHEMA = pa.schema([pa.field("item_key", pa.int64(), nullable=False), pa.field("score", pa.float32(), nullable=False)])
LIST_ITEMS_MAX = 2_000
_HALF_LIFE = b"half_life_us"
EVERYBODY = 0  # the key of the one row that a list is, among rows made since the run


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


def with_half_life(table: pa.Table, half_life_us: float) -> pa.Table:
    """The table, and in its file's metadata how fast what it sums up fades: who goes on from it has to know."""
    return table.replace_schema_metadata({_HALF_LIFE: repr(half_life_us).encode()})


def read_half_life_us(path: Path) -> float:
    """What `with_half_life` put into an index file. Raises: CorruptData where nothing did."""
    found = (pq.read_schema(path).metadata or {}).get(_HALF_LIFE)
    if found is None:
        expected, fix = "a half-life in its metadata", "Train again, or copy the run directory whole."
        raise CorruptData(str(path), came=f"no {_HALF_LIFE.decode()}", expected=expected, fix=fix)
    return float(found)


class RankedList:
    """Implements CandidateSource over one list."""

    def __init__(
        self,
        name: str,
        item_key: npt.NDArray[np.int64],
        score: npt.NDArray[np.float32],
        newer: Mapping[int, Row],
    ) -> None:
        """item_key [M], score [M]: distinct items, best first. newer: where a newer list may be, under EVERYBODY."""
        self.name, self._row, self._newer = name, (item_key, score), newer

    @classmethod
    def read(cls, name: str, path: Path, fresh: FreshRows | None = None) -> RankedList:
        """From an index file. Raises: CorruptData."""
        table = read_table(path, SCHEMA)
        item_key, score = table.column("item_key").to_numpy(), table.column("score").to_numpy()
        return cls(name, item_key, score, newer_rows(fresh, name))

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """The head of the list."""
        return self.head(query, user, limit)

    def head(self, query: Query, user: UserFeatures, limit: int | None = None) -> Candidates:
        """The first `limit` items, None = all, without what the user has touched when the query wants only new ones."""
        item_key, score = self._newer.get(EVERYBODY, self._row)
        if query.new_only:
            untouched = ~np.isin(item_key, touched(user))
            item_key, score = item_key[untouched], score[untouched]
        return Candidates.from_source(self.name, item_key[:limit], score[:limit])
