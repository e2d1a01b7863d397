"""Measures of a reranker on validation lists, the blend weight and the calibration. NumPy only.

Shape legend: n candidates of one list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm_reranker.blend import blend
from recsys.evaluation import PairedResult, paired_bootstrap

Floats = npt.NDArray[np.float32]
_WEIGHTS = tuple(round(0.1 * i, 1) for i in range(1, 11))
_P_MAX = 0.05  # two-sided: how sure a gain must be before the reranker gets a say
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


def usable(scores: Sequence[Floats], rank: Sequence[Floats]) -> list[Floats]:
    """A teacher's scores; the ranker's for a list it said nothing about, its lowest for a row it left out."""
    filled = []
    for mine, theirs in zip(scores, rank, strict=True):
        known = np.isfinite(mine)
        filled.append(np.where(known, mine, mine[known].min()).astype(np.float32) if known.any() else theirs)
    return filled


def mean_ndcg(scores: Sequence[Floats], labels: Sequence[Floats]) -> float:
    """Mean NDCG@10, 0 where there are no lists."""
    values = ndcg(scores, labels)
    return round(float(values.mean()), 5) if len(values) else 0.0


def gain(scores: Sequence[Floats], over: Sequence[Floats], labels: Sequence[Floats], seed: int) -> PairedResult:
    """The change of mean NDCG@10 that one order of the lists is over another."""
    return paired_bootstrap(ndcg(scores, labels), ndcg(over, labels), seed)


def is_sure(test: PairedResult) -> bool:
    """Whether a gain is one that may be acted on: above zero, with p < 0.05."""
    return test.diff > 0 and test.p < _P_MAX


def choose_weight(rank: Sequence[Floats], rerank: Sequence[Floats], labels: Sequence[Floats], seed: int) -> float:
    """The blend weight of the best mean NDCG@10; 0 unless its gain over the ranker's order is sure."""
    if not labels:
        return 0.0
    blended = {w: [blend(a, b, w) for a, b in zip(rank, rerank, strict=True)] for w in _WEIGHTS}
    best = max(blended, key=lambda w: (ndcg(blended[w], labels).mean(), -w))
    return best if is_sure(gain(blended[best], rank, labels, seed)) else 0.0


def ece(log_odds: Floats, label: Floats) -> float:
    """Expected calibration error of sigmoid(log_odds), 10 equal-width bins. Source: Guo et al., ICML 2017."""
    p = np.exp(-np.logaddexp(0, -log_odds.astype(np.float64)))  # no overflow, however sure
    bin_ = np.minimum((p * _ECE_BINS).astype(int), _ECE_BINS - 1)
    gap = np.bincount(bin_, weights=p - label, minlength=_ECE_BINS)
    return float(np.abs(gap).sum() / len(p))


def platt(log_odds: Floats, label: Floats) -> tuple[float, float]:
    """Scale and bias so that sigmoid(scale x + bias) fits the labels; scale stays positive, so no order changes.

    Source: Platt 1999.
    """
    scale, bias = _logistic(log_odds[:, None], label, prior=[1.0, 0.0]).tolist()
    return (scale, bias) if np.isfinite([scale, bias]).all() and scale > 0.01 else (1.0, 0.0)


def beside(rank: Floats, log_odds: Floats, label: Floats) -> tuple[float, float, float]:
    """Weights a, b and c so that sigmoid(a rank + b log_odds + c) fits the labels; (1, 0, 0) where nothing can be said.

    rank: the ranker's logits; log_odds: of a teacher that does not know them, on any scale.
    """
    spread = float(log_odds.std()) or 1.0
    a, b, c = _logistic(np.stack([rank, log_odds / spread], 1), label, prior=[1.0, 0.0, 0.0]).tolist()
    return (a, b / spread, c) if np.isfinite([a, b, c]).all() else (1.0, 0.0, 0.0)


def _logistic(x: Floats, label: Floats, prior: Sequence[float], steps: int = 50) -> npt.NDArray[np.float64]:
    """Weights of the columns of x [n, k] and a bias, [k + 1]: Newton's method on the log-loss with a small ridge."""
    x = np.column_stack([x.astype(np.float64), np.ones(len(x))])
    towards, ridge = np.array(prior), 1e-3 * len(x) * np.eye(len(prior))
    weights = towards.copy()
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - label) + ridge @ (weights - towards)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return weights
