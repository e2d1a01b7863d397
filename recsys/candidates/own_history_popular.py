"""Own history, recent popularity as tie-break and fill: the one line of code a cascade has to beat."""

from __future__ import annotations

import numpy as np

from feature_store import UserFeatures
from recsys.candidates.own_history import best_first, unfinished
from recsys.candidates.ranked_list import RankedList
from recsys.core import Candidates, Deadline, Query

NAME = "own_history_popular"
_TIE_BREAK = 0.999  # popularity, 1.0 for the top item, stays below one more day with a purchase


class OwnHistoryPopular:
    """Implements CandidateSource. Score = unfinished business + days with a purchase + share of the top popularity."""

    name = NAME

    def __init__(self, popular: RankedList) -> None:
        """popular: the list that breaks ties and fills up."""
        self._popular = popular

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """The user's items and popular ones, best first."""
        popular = self._popular.head(query, user)
        own = user.pair_item_key[:0] if query.new_only else user.pair_item_key
        found, at = np.unique(np.concatenate([own, popular.item_key]), return_inverse=True)
        score = np.zeros(len(found), np.float64)
        score[at[len(own) :]] = _TIE_BREAK * popular.scores[:, 0]
        if len(own):
            score[at[: len(own)]] += unfinished(user) + user.pair_purchase_days
        rows = best_first(found, score.astype(np.float32), limit)
        return Candidates.from_source(self.name, found[rows], score[rows].astype(np.float32))
