"""Own history: what the user has bought, put into the cart or looked at before. The strongest signal in commerce."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.candidates.behaviour import DAY_US, WEIGHT
from recsys.core import Candidates, Deadline, EventType, Query

NAME = "own_history"


OPEN_HALF_LIFE_DAYS = 5.0
HABIT_HALF_LIFE_DAYS = 180.0
_NOT_BOUGHT = WEIGHT * (np.arange(len(WEIGHT)) != EventType.PURCHASE)


def unfinished(user: UserFeatures) -> npt.NDArray[np.float32]:
    """Weight of what was viewed, favoured or put into the cart since the item was last bought, fading [P].

    A cart that was bought since is finished business: in a shop where people rarely buy a thing twice, it would
    otherwise stand before the cart that is still open.
    """
    is_open = user.pair_last_us > user.pair_last_purchase_us
    weight = (user.pair_count @ _NOT_BOUGHT) * np.exp2(-_days_since(user, user.pair_last_us) / OPEN_HALF_LIFE_DAYS)
    return np.where(is_open, weight, 0.0).astype(np.float32)


def interest(user: UserFeatures) -> npt.NDArray[np.float32]:
    """Score of every pair [P]: unfinished business, plus days with a purchase, slowly fading, plus a recency tie-break.

    Where there are only purchases this is the user's own frequency; where hardly anything is bought twice, recency.
    """
    habit = user.pair_purchase_days * np.exp2(-_days_since(user, user.pair_last_purchase_us) / HABIT_HALF_LIFE_DAYS)
    recency = 0.1 / (1.0 + _days_since(user, user.pair_last_us))
    return np.asarray(unfinished(user) + habit + recency, np.float32)


def _days_since(user: UserFeatures, then_us: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.maximum(user.as_of_us - then_us, 0) / DAY_US


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
        return Candidates.from_source(self.name, user.pair_item_key[rows], score[rows])
