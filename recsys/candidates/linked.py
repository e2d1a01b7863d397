"""Linked: from the items of this user's past to their neighbours in a table of item-item links.

Co-visitation, regression and text similarity are its uses: other tables, other memories of the past.

Shape legend: S seeds, E links of all seeds.
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
from recsys.candidates.rows import FreshRows, RowTable, newer_rows
from recsys.core import Candidates, Deadline, Query, keys

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


class Linked:
    """Implements CandidateSource over links; NAME is the sum over the seeds, NAME_max the strongest single link."""

    def __init__(self, name: str, table: pa.Table, memory: Memory, fresh: FreshRows | None = None) -> None:
        """table: SCHEMA, sorted by item_key, best neighbour first. fresh: rows that stand in place of the table's."""
        self.name, self.memory = name, memory
        self._rows = RowTable(table, newer_rows(fresh, name))

    @classmethod
    def load(cls, name: str, path: Path, memory: Memory, fresh: FreshRows | None = None) -> Linked:
        """From an index file. Raises: CorruptData."""
        return cls(name, read_table(path, SCHEMA), memory, fresh)

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """Neighbours of the user's recent items, the cart and the item on screen."""
        neighbour, link = self._rows.weighted(*seeds(query, user, self.memory))
        found, at = np.unique(neighbour, return_inverse=True)
        link = link.astype(np.float32)
        total = np.bincount(at, link, minlength=len(found)).astype(np.float32)
        strongest = np.zeros(len(found), np.float32)
        np.maximum.at(strongest, at, link)
        if query.new_only:
            fresh = ~np.isin(found, touched(user))
            found, total, strongest = found[fresh], total[fresh], strongest[fresh]
        rows = best_first(found, total, limit)
        best = Candidates.from_source(self.name, found[rows], total[rows])
        return best.with_score(f"{self.name}_max", strongest[rows])
