"""tifu_knn: a user's baskets as one vector that fades in two steps, blended with those of similar users.

Shape legend: V actions, U users, M items.
Source: Hu et al., "Modeling personalized item frequency information for next-basket recommendation" (SIGIR 2020),
section 4; the settings are those the authors chose most often.
"""

from __future__ import annotations

import numpy as np

from recsys.replay.peers.base import Interactions, PeerSource, Scores, package

NEIGHBOURS = 300
GROUP_BASKETS = 7
DECAY_IN_GROUP, DECAY_OF_GROUPS = 0.9, 0.7
OWN_SHARE = 0.7


def tifu_knn(seen: Interactions, _seed: int) -> PeerSource:
    """Own vector and the mean of the nearest users' (cosine), OWN_SHARE of the former."""
    steps = seen.steps_back()
    group, place = steps // GROUP_BASKETS, steps % GROUP_BASKETS
    fading = DECAY_IN_GROUP**place * DECAY_OF_GROUPS ** group.astype(np.float64)
    vectors = seen.matrix(fading)
    baskets = np.zeros(len(seen.user_row))
    np.maximum.at(baskets, seen.user, steps + 1)
    vectors = (package("scipy.sparse").diags(1.0 / np.maximum(baskets, 1.0)) @ vectors).tocsr().astype(np.float32)
    norm = np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel())
    by_item = vectors.T.tocsr()

    def scores(row: int) -> Scores:
        own = vectors[row]
        like = np.asarray((own @ by_item).todense()).ravel() / np.maximum(norm * norm[row], 1e-12)
        like[row] = -1.0
        near = np.argsort(-like, kind="stable")[:NEIGHBOURS]
        near = near[like[near] > 0]
        others = np.asarray(vectors[near].mean(axis=0)).ravel() if len(near) else 0.0
        return np.asarray(OWN_SHARE * own.toarray().ravel() + (1.0 - OWN_SHARE) * others, np.float32)

    return PeerSource("tifu_knn", seen, scores)
