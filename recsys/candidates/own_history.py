"""Own history: what the user has bought, put into the cart or looked at before. The strongest signal in commerce."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.candidates.behaviour import DAY_US, WEIGHT, touched
from recsys.core import Candidates, Deadline, EventType, Query

NAME = "own_history"


def interest(user: UserFeatures) -> npt.NDArray[np.float32]:
    """Score of every pair [P]: days with a purchase first, then the weight of the other actions, then recency."""
    weight: npt.NDArray[np.float32] = user.pair_count @ WEIGHT
    days_since = np.maximum(user.as_of_us - user.pair_last_us, 0) / DAY_US
    recency = 1.0 / (1.0 + days_since)
    return np.asarray(user.pair_count[:, EventType.PURCHASE] + 0.1 * np.log1p(weight) + 0.5 * recency, np.float32)


def best_first(item_key: npt.NDArray[np.int64], score: npt.NDArray[np.float32], limit: int) -> npt.NDArray[np.int64]:
    """Rows of the `limit` highest scores, ties by key."""
    return np.lexsort((item_key, -score))[:limit]


class OwnHistory:
    """Implements CandidateSource from the user's own features; needs no index."""

    name = NAME

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """The user's items, best first; none when only new items are wanted."""
        if query.new_only:
            return Candidates.from_source(self.name, np.empty(0, np.int64), np.empty(0, np.float32))
        score = interest(user)
        rows = best_first(user.pair_item_key, score, limit)
        rows = rows[np.isin(user.pair_item_key[rows], touched(user))]
        return Candidates.from_source(self.name, user.pair_item_key[rows], score[rows])
