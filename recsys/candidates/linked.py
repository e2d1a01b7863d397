"""Linked: from the items of this user's past to their neighbours in a table of item-item links.

Co-visitation, regression and text similarity are its uses: other tables, other memories of the past.

Shape legend: M items, S seeds, E links of all seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from feature_store import UserFeatures
from recsys.candidates.behaviour import DAY_US, WEIGHT, touched
from recsys.candidates.own_history import best_first
from recsys.candidates.ranked_list import read_table
from recsys.core import Candidates, Deadline, Query, keys
from recsys.core.ids import find_rows

SCHEMA = pa.schema(
    [
        pa.field("item_key", pa.int64(), nullable=False),
        pa.field("neighbour_key", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """How a user's past counts: the newest `items_max` actions, halved every `half_life_days`, times `step_decay` per
    basket (distinct time) back.
    """

    items_max: int = 100
    half_life_days: float = 60.0
    step_decay: float = 1.0


def seeds(query: Query, user: UserFeatures, memory: Memory) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Distinct items to start from [S] and how much each counts: behaviour weight, faded by age; now = full weight."""
    recent = slice(-memory.items_max, None)
    time_us = user.recent_time_us[recent]
    days = np.maximum(user.as_of_us - time_us, 0) / DAY_US
    past = np.sqrt(WEIGHT[user.recent_event_type[recent]]) * np.exp2(-days / memory.half_life_days)
    if memory.step_decay < 1.0 and len(time_us):
        basket = np.cumsum(np.diff(time_us, prepend=time_us[0]) != 0)
        past = past * memory.step_decay ** (basket[-1] - basket)
    now = keys([i for i in (query.current_item, *query.cart) if i])
    key = np.concatenate([user.recent_item_key[recent], now])
    weight = np.concatenate([past, np.full(len(now), np.sqrt(WEIGHT.max()))])
    distinct, at = np.unique(key, return_inverse=True)
    strongest = np.zeros(len(distinct), np.float32)
    np.maximum.at(strongest, at, weight.astype(np.float32))
    return distinct, strongest


def gather(
    start: npt.NDArray[np.int64], row: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of all entries of the given rows of a CSR layout, and how many each row has."""
    begin, count = start[row], start[row + 1] - start[row]
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(begin, count) + within, count


def rows_of(
    sorted_key: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Row of each wanted key in ascending keys, for those that are there, and which are."""
    row = find_rows(sorted_key, wanted)
    known = row >= 0
    return row[known], known


class Linked:
    """Implements CandidateSource over links; NAME is the sum over the seeds, NAME_max the strongest single link."""

    def __init__(self, name: str, table: pa.Table, memory: Memory) -> None:
        """table: SCHEMA, sorted by item_key, best neighbour first."""
        self.name, self.memory = name, memory
        owner = table.column("item_key").to_numpy()
        self._neighbour = table.column("neighbour_key").to_numpy()
        self._score = table.column("score").to_numpy()
        self._item_key, start = np.unique(owner, return_index=True)
        self._start = np.append(start, len(owner))

    @classmethod
    def load(cls, name: str, path: Path, memory: Memory) -> Linked:
        """From an index file. Raises: CorruptData."""
        return cls(name, read_table(path, SCHEMA), memory)

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """Neighbours of the user's recent items, the cart and the item on screen."""
        seed_key, weight = seeds(query, user, self.memory)
        row, known = rows_of(self._item_key, seed_key)
        edge, count = gather(self._start, row)
        found, at = np.unique(self._neighbour[edge], return_inverse=True)
        link = (self._score[edge] * np.repeat(weight[known], count)).astype(np.float32)
        total = np.bincount(at, link, minlength=len(found)).astype(np.float32)
        strongest = np.zeros(len(found), np.float32)
        np.maximum.at(strongest, at, link)
        if query.new_only:
            fresh = ~np.isin(found, touched(user))
            found, total, strongest = found[fresh], total[fresh], strongest[fresh]
        rows = best_first(found, total, limit)
        best = Candidates.from_source(self.name, found[rows], total[rows])
        return best.with_score(f"{self.name}_max", strongest[rows])
