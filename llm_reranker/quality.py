"""Measures of a reranker on validation lists, the blend weight and the calibration. NumPy only.

Shape legend: n candidates of one list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm_reranker.blend import blend
from recsys.evaluation import paired_bootstrap

Floats = npt.NDArray[np.float32]
_WEIGHTS = tuple(round(0.1 * i, 1) for i in range(1, 11))
_P_MAX = 0.1  # two-sided: how sure a gain must be before the reranker gets a say
_ECE_BINS = 10


def ndcg(scores: Sequence[Floats], labels: Sequence[Floats], k: int = 10) -> npt.NDArray[np.float64]:
    """NDCG@k of each list with at least one positive, binary gain, ideal among the list's own positives."""
    values = []
    for score, label in zip(scores, labels, strict=True):
        gain = (label > 0)[np.argsort(-score, kind="stable")][:k]
        discount = 1 / np.log2(np.arange(2, k + 2))
        ideal = discount[: min(k, int((label > 0).sum()))].sum()
        if ideal:
            values.append(float(gain @ discount[: len(gain)] / ideal))
    return np.array(values)


def choose_weight(rank: Sequence[Floats], rerank: Sequence[Floats], labels: Sequence[Floats], seed: int) -> float:
    """The blend weight of the best mean NDCG@10; 0 unless its gain over the ranker's order is sure (p < 0.1)."""
    base = ndcg(rank, labels)
    blended = {
        w: ndcg([blend(a, b, w) for a, b in zip(rank, rerank, strict=True)], labels) for w in _WEIGHTS
    }  # fmt: skip
    best = max(blended, key=lambda w: (blended[w].mean(), -w))
    gain = paired_bootstrap(blended[best], base, seed)
    return best if gain.diff > 0 and gain.p < _P_MAX else 0.0


def ece(log_odds: Floats, label: Floats) -> float:
    """Expected calibration error of sigmoid(log_odds), 10 equal-width bins. Source: Guo et al., ICML 2017."""
    p = 1 / (1 + np.exp(-log_odds.astype(np.float64)))
    bin_ = np.minimum((p * _ECE_BINS).astype(int), _ECE_BINS - 1)
    gap = np.bincount(bin_, weights=p - label, minlength=_ECE_BINS)
    return float(np.abs(gap).sum() / len(p))


def platt(log_odds: Floats, label: Floats, steps: int = 50) -> tuple[float, float]:
    """Scale and bias so that sigmoid(scale x + bias) fits the labels; scale stays positive, so no order changes.

    Newton's method on the log-loss with a small ridge towards (1, 0). Source: Platt 1999.
    """
    x = np.stack([log_odds.astype(np.float64), np.ones(len(log_odds))], 1)
    prior, ridge = np.array([1.0, 0.0]), 1e-3 * len(log_odds) * np.eye(2)
    weights = prior.copy()
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - label) + ridge @ (weights - prior)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    scale, bias = weights.tolist()
    return (scale, bias) if np.isfinite(weights).all() and scale > 0.01 else (1.0, 0.0)
