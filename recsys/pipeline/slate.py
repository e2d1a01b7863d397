"""Slate items: ids, scores by stage, sources and a reason for each place."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.core import Candidates, EventType, SlateItem
from recsys.ranking.catalogue import Catalogue

# The word of the strongest source, in this order.
REASONS = {
    "own_history": "seen-before",
    "own_history_popular": "popular",
    "buy_again": "buy-again",
    "covisit": "goes-with",
    "swing": "goes-with",
    "regression": "goes-with",
    "text_similar": "similar",
    "user_knn": "for-you",
    "ann": "for-you",
    "trending": "trending",
    "new_arrivals": "new",
    "just_listed": "new",
    "matching": "matching",
    "popular": "popular",
}
_OWN = {"slate", "order"}  # columns of the pipeline itself: what no stage said about an item
BOUGHT_BEFORE = "bought-before"


def slate_items(
    user: UserFeatures,
    shown: Candidates,
    score: npt.NDArray[np.float32],
    propensity: npt.NDArray[np.float32],
    catalogue: Catalogue,
) -> tuple[SlateItem, ...]:
    """One SlateItem per row of `shown` [K], in its order. Every key must be known to the run."""
    bought = np.isin(shown.item_key, user.pair_item_key[user.pair_count[:, EventType.PURCHASE] > 0])
    columns = [n for n in shown.score_names if n not in _OWN]
    table = shown.scores[:, [shown.score_names.index(n) for n in columns]].tolist()
    items = []
    for row, item_id in enumerate(catalogue.ids(shown.item_key)):
        assert item_id is not None, "the filter `unlisted` lets items with a name through only"
        sources = shown.sources_of(row)
        reason = next((word for source, word in REASONS.items() if source in sources), "")
        items.append(
            SlateItem(
                item_id=item_id,
                item_key=int(shown.item_key[row]),
                score=float(score[row]),
                sources=sources,
                reason=BOUGHT_BEFORE if bought[row] else reason,
                propensity=float(propensity[row]),
                stage_scores={n: v for n, v in zip(columns, table[row], strict=True) if v == v},
            )
        )
    return tuple(items)
