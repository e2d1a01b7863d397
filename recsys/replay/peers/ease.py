"""ease: a linear item-item autoencoder with a closed form, asked with a history that fades.

Shape legend: M items, K items that are modelled.
Source: Steck, "Embarrassingly shallow autoencoders for sparse data" (WWW 2019), section 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.replay.peers.base import Interactions, PeerSource, Scores, package

PENALTY = 300.0
STEP_DECAY = 0.7  # of the history's weight, per basket back
ITEMS_MAX = 16_384  # a dense K x K inverse: 1 GiB and two minutes of one core at that size


def ease(seen: Interactions, _seed: int) -> PeerSource:
    """B = I - P diag(1 / diag P), P = (X'X + penalty I)^-1, over the ITEMS_MAX items most users touched."""
    x = seen.matrix()
    popular = np.argsort(-np.asarray(x.sum(axis=0)).ravel(), kind="stable")[:ITEMS_MAX]
    modelled = np.sort(popular)
    links_KK = _links((x[:, modelled].T @ x[:, modelled]).toarray())
    history = seen.matrix(STEP_DECAY ** seen.steps_back().astype(np.float64))[:, modelled].tocsr()
    history.data = np.minimum(history.data, 1.0)

    def scores(row: int) -> Scores:
        start, stop = history.indptr[row], history.indptr[row + 1]
        all_items = np.zeros(len(seen.item_key), np.float32)
        all_items[modelled] = history.data[start:stop] @ links_KK[history.indices[start:stop]]
        return all_items

    return PeerSource("ease", seen, scores)


def _links(gram_KK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The weights B [K, K] of a Gram matrix, which is overwritten; the diagonal is 0."""
    lapack = package("scipy.linalg.lapack")
    diagonal = np.diag_indices_from(gram_KK)
    gram_KK[diagonal] += PENALTY
    factor, _ = lapack.spotrf(gram_KK.T, lower=1, overwrite_a=1)
    inverse, _ = lapack.spotri(factor, lower=1, overwrite_c=1)
    lower = np.tril(inverse, -1)
    full = lower + lower.T
    full /= -np.diag(inverse)
    full[diagonal] = 0.0
    return np.ascontiguousarray(full, np.float32)
