"""Select: order by score and cut, with an optional cap per category. Deterministic: every propensity is 1.0."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.core import Candidates, Query
from recsys.ranking.base import Selection
from recsys.ranking.catalogue import UNKNOWN, Catalogue


class TopSelector:
    """Implements Selector: best score first, non-finite last, ties by key."""

    def __init__(self, catalogue: Catalogue, category_items_max: int = 0) -> None:
        """category_items_max: items of one category before those of others come first; 0 = no cap."""
        self._catalogue, self._category_items_max = catalogue, category_items_max

    def select(self, query: Query, found: Candidates, score: npt.NDArray[np.float32], limit: int) -> Selection:
        """At most `limit` rows. A capped category's surplus moves behind the rest, it is never lost."""
        finite = np.where(np.isfinite(score), score, -np.inf)
        rows = np.lexsort((found.item_key, -finite))
        if self._category_items_max:
            surplus = self._surplus(found.item_key[rows])
            rows = np.concatenate([rows[~surplus], rows[surplus]])
        rows = rows[: max(limit, 0)]
        return Selection(rows=rows, propensity=np.ones(len(rows), np.float32))

    def _surplus(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """True [N] for items whose category already has its share among the items before."""
        category = self._catalogue.category(item_key)
        order = np.argsort(category, kind="stable")
        _, start, count = np.unique(category[order], return_index=True, return_counts=True)
        nth = np.empty(len(category), np.int64)
        nth[order] = np.arange(len(category)) - np.repeat(start, count)
        return np.asarray((nth >= self._category_items_max) & (category != UNKNOWN), np.bool_)
