"""Joins the ranker's and the reranker's scores into the final order. Shape legend: N candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def blend(
    rank_score: npt.NDArray[np.float32], rerank_score: npt.NDArray[np.float32], weight: float
) -> npt.NDArray[np.float32]:
    """Final score float32 [N]: (1 - weight) x rank + weight x rerank, each standardised over what both scored.

    Standardised, the two need no common scale, and a constant reranker leaves the ranker's order. Candidates that the
    reranker did not reach (NaN or infinite) come after those it did, in the ranker's order; where it reached
    none, or weight is 0, the ranker's order stands. A candidate without a rank_score counts as the lowest one.
    """
    rank = _fill_lowest(np.asarray(rank_score, np.float32))
    rerank = np.asarray(rerank_score, np.float32)
    scored = np.isfinite(rerank)
    if weight == 0 or not scored.any():
        return _standardise(rank)
    final = np.empty_like(rank)
    final[scored] = (1 - weight) * _standardise(rank[scored]) + weight * _standardise(rerank[scored])
    if not scored.all():
        final[~scored] = rank[~scored] - rank[~scored].max() + final[scored].min() - 1
    return final


def _fill_lowest(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    finite = np.isfinite(values)
    filled: npt.NDArray[np.float32] = np.where(finite, values, values[finite].min() if finite.any() else 0)
    return filled


def _standardise(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not len(values):
        return values
    centred = values.astype(np.float64) - values.mean(dtype=np.float64)
    spread = centred.std()
    scaled: npt.NDArray[np.float32] = (centred / spread if spread > 1e-9 else centred * 0).astype(np.float32)
    return scaled
