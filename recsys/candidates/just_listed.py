"""Just listed: what the catalogue stream has brought since the run was trained, newest first.

Nobody has to have touched it, nothing has to be known of it, and shoppers without a past get it too. Needs no index.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.candidates.behaviour import touched
from recsys.core import Candidates, Deadline, Query

NAME = "just_listed"
_NONE = np.empty(0, np.int64)


class JustListed:
    """Implements CandidateSource. Score = 1 for the newest, falling to 0."""

    name = NAME

    def __init__(self, new_items: Callable[[int], npt.NDArray[np.int64]]) -> None:
        """new_items: the first so many keys of what the stream has listed and the run does not know, newest first."""
        self._new_items = new_items

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """The newest items."""
        old = touched(user) if query.new_only else _NONE
        item_key = self._new_items(limit + len(old))
        item_key = item_key[~np.isin(item_key, old)][:limit]
        score = 1.0 - np.arange(len(item_key)) / max(len(item_key), 1)
        return Candidates.from_source(self.name, item_key, score.astype(np.float32))
