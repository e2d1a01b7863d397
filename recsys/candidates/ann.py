"""[heavy] ANN: the items nearest to the user's tower vector. Shape legend: D dimension."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.candidates.behaviour import touched
from recsys.candidates.nearest import VectorIndex
from recsys.candidates.nearest.static import other_dimension
from recsys.core import Candidates, Deadline, Query

NAME = "ann"


class UserEncoder(Protocol):
    """What a tower offers; `recsys.models.tower.Tower` is one."""

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        ...

    def encode_user(
        self,
        history_keys: npt.NDArray[np.int64],
        history_types: npt.NDArray[np.int8],
        history_times_us: npt.NDArray[np.int64],
        as_of_us: int,
    ) -> npt.NDArray[np.float32]:
        """The user vector [D] of one history, oldest first."""
        ...


class LocalAnnSource:
    """Implements CandidateSource with a tower and an index in this process."""

    name = NAME
    searches_where = True

    def __init__(self, tower: UserEncoder, index: VectorIndex) -> None:
        """Raises: VersionMismatch when the tower's vectors have another dimension than the index."""
        if tower.dim != index.dim:
            raise other_dimension(f"a tower of dimension {tower.dim}", index.dim)
        self._tower, self._index = tower, index

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """Nearest items; none for a user without actions, of whom the tower knows nothing."""
        if not len(user.recent_item_key):
            return Candidates.from_source(self.name, np.empty(0, np.int64), np.empty(0, np.float32))
        deadline.require("ann")
        vector = self._tower.encode_user(
            user.recent_item_key, user.recent_event_type, user.recent_time_us, query.as_of_us
        )
        known = touched(user) if query.new_only else user.pair_item_key[:0]
        item_key, score = self._index.search(vector[None, :], limit + len(known), query.where)
        found = (item_key[0] >= 0) & ~np.isin(item_key[0], known)
        return Candidates.from_source(self.name, item_key[0][found][:limit], score[0][found][:limit])
