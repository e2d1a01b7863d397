"""als and bpr: matrix factorisation by `implicit`, 64 factors, on users' summed behaviour weights.

Source: Hu, Koren and Volinsky 2008 (implicit feedback); Rendle et al. 2009 (BPR); https://github.com/benfred/implicit.
"""

from __future__ import annotations

import numpy as np

from recsys.replay.peers.base import Interactions, PeerSource, package

FACTORS = 64
_CONFIDENCE = 10.0


def als(seen: Interactions, seed: int) -> PeerSource:
    """Alternating least squares; confidence = 1 + 10 log(1 + weight)."""
    counted = seen.matrix(seen.weight)
    counted.data = _CONFIDENCE * np.log1p(counted.data)
    model = package("implicit.als").AlternatingLeastSquares(
        factors=FACTORS, regularization=0.1, alpha=1.0, iterations=15, num_threads=1, random_state=seed
    )
    model.fit(counted, show_progress=False)
    users, items = model.user_factors, model.item_factors
    return PeerSource("als", seen, lambda row: _positive(items @ users[row]))


def bpr(seen: Interactions, seed: int) -> PeerSource:
    """Bayesian personalised ranking with `implicit`'s settings of learning rate and regularisation."""
    model = package("implicit.bpr").BayesianPersonalizedRanking(
        factors=FACTORS, iterations=100, num_threads=1, random_state=seed
    )
    model.fit(seen.matrix(), show_progress=False)
    users, items = model.user_factors, model.item_factors
    return PeerSource("bpr", seen, lambda row: _positive(items @ users[row]))


def _positive(score: np.ndarray) -> np.ndarray:
    """Shifted above 0: only the order means something."""
    return np.asarray(score - score.min() + 1e-6, np.float32)
