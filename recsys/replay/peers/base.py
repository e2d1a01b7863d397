"""What every peer shares: the interactions it is fitted on, and the source that answers with its scores.

Shape legend: V actions, U users, M items.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store import UserFeatures
from recsys.candidates.behaviour import actions, touched
from recsys.candidates.own_history import best_first
from recsys.core import BadInput, Candidates, Deadline, Query
from recsys.core.items import ItemTable

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interactions:
    """V actions before the cut, by user, then time.

    user_row: row of each user id, in [0, U). item_key: [M] ascending. user, item: rows, int64 [V]; weight: behaviour
    weight, float32 [V]; time_us: int64 [V].
    """

    until_us: int
    user_row: Mapping[str, int]
    item_key: npt.NDArray[np.int64]
    user: npt.NDArray[np.int64]
    item: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    time_us: npt.NDArray[np.int64]

    @classmethod
    def of(cls, events: pl.DataFrame, items: ItemTable, until_us: int) -> Interactions:
        """From a dataset's events; what is no interest in a known item before `until_us` is left out."""
        log = actions(events, items, until_us).sort("user", "time_us", maintain_order=True)
        item_key, item = np.unique(log["item_key"].to_numpy(), return_inverse=True)
        users = log["user_id"].unique(maintain_order=True).to_list()
        return cls(
            until_us=until_us,
            user_row={user: row for row, user in enumerate(users)},
            item_key=item_key,
            user=log["user"].to_numpy().astype(np.int64) - 1,
            item=item,
            weight=log["weight"].to_numpy(),
            time_us=log["time_us"].to_numpy(),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(U, M)."""
        return len(self.user_row), len(self.item_key)

    def steps_back(self) -> npt.NDArray[np.int64]:
        """How many later baskets (distinct times) the action's user has, int64 [V]."""
        new_user = np.diff(self.user, prepend=-1) != 0
        basket = np.cumsum(new_user | (np.diff(self.time_us, prepend=-1) != 0))
        last = np.zeros(len(self.user_row), np.int64)
        last[self.user] = basket  # ascending, so the last one of a user stays
        steps: npt.NDArray[np.int64] = last[self.user] - basket
        return steps

    def matrix(self, value: npt.NDArray[np.floating[Any]] | None = None) -> Any:
        """Users by items, scipy CSR float32 [U, M]: 1 where there was interest, or the sum of `value` [V]."""
        sparse = package("scipy.sparse")
        data = np.ones(len(self.user), np.float32) if value is None else value.astype(np.float32)
        summed = sparse.csr_matrix((data, (self.user, self.item)), shape=self.shape, dtype=np.float32)
        if value is None:
            summed.data[:] = 1.0
        return summed


class PeerSource:
    """Implements CandidateSource over a function from a user's row to the scores of all items."""

    def __init__(self, name: str, seen: Interactions, scores_of: Callable[[int], Scores]) -> None:
        """scores_of: [M] for a row of `seen`; items that are not finite or not above 0 are left out."""
        self.name, self._seen, self._scores_of = name, seen, scores_of

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """The best items of the whole catalogue; none for a user the peer was not fitted on."""
        row = self._seen.user_row.get(query.user_id)
        if row is None:
            return Candidates.from_source(self.name, np.empty(0, np.int64), np.empty(0, np.float32))
        score = self._scores_of(row)
        keep = np.isfinite(score) & (score > 0)
        if query.new_only:
            keep &= ~np.isin(self._seen.item_key, touched(user))
        keys, score = self._seen.item_key[keep], score[keep].astype(np.float32)
        rows = best_first(keys, score, limit)
        return Candidates.from_source(self.name, keys[rows], score[rows])


def package(name: str) -> Any:
    """A module of the extra `peers`. Raises: BadInput when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            "replay, peer arms",
            came=f"no module {error.name}",
            expected="the extra `peers`",
            fix="pip install 'double11[peers]'",
        ) from error
