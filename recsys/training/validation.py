"""Measures of ranked lists on the validation window, beside the simplest order of the same candidates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from recsys.models.ranker import Calibration
from recsys.training.rank_lists import RankLists

_K = 10
_BINS = 15
Scores = npt.NDArray[np.float32]
Labels = npt.NDArray[np.bool_]


def list_measures(lists: RankLists, scores: npt.NDArray[np.float32]) -> dict[str, float]:
    """NDCG@10 of the ranker and of own history, the share of relevant items found, queries; of lists of one task.

    scores: [N], calibrated or not. Relevant items that no source found count as misses, as in a replay.
    """
    own = lists.values[:, lists.names.index("own_history_score")]
    return {
        "ndcg@10": float(ndcg(lists, scores).mean()),
        "own_history_ndcg@10": float(ndcg(lists, np.nan_to_num(own, nan=-np.inf)).mean()),
        "retrieval_ndcg@10": float(ndcg(lists, lists.retrieval_score).mean()),
        "candidates_recall": float(found_share(lists).mean()),
        "queries": float(len(lists)),
    }


def ndcg(lists: RankLists, scores: npt.NDArray[np.float32], k: int = _K) -> npt.NDArray[np.float64]:
    """NDCG@k of each list [Q], binary gain, ideal = min(relevant, k); ties by item key, -inf never hits."""
    query = lists.query_of_row()
    order = np.lexsort((lists.item_key, -scores, query))
    place = np.arange(len(query)) - lists.offsets[query]
    hit = lists.label[order] & (place < k) & (scores[order] > -np.inf)
    gain = np.bincount(query, weights=hit / np.log2(place + 2.0), minlength=len(lists))
    ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))])
    value: npt.NDArray[np.float64] = gain / ideal[np.minimum(lists.num_relevant, k)]
    return value


def found_share(lists: RankLists) -> npt.NDArray[np.float64]:
    """Share of each query's relevant items that is among its candidates [Q]."""
    found = np.bincount(lists.query_of_row(), weights=lists.label, minlength=len(lists))
    share: npt.NDArray[np.float64] = found / lists.num_relevant
    return share


def recall(lists: RankLists, scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.float64]:
    """Recall@k of each list [Q], ties by item key."""
    query = lists.query_of_row()
    order = np.lexsort((lists.item_key, -scores, query))
    hit = lists.label[order] & (np.arange(len(query)) - lists.offsets[query] < k)
    found: npt.NDArray[np.float64] = np.bincount(query, weights=hit, minlength=len(lists)) / lists.num_relevant
    return found


def as_good(quality: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which of these ways [W] are within one standard error of the best; quality: of each way in each list [W, Q].

    Source: Breiman et al. 1984, section 3.4.3 (the rule of one standard error).
    """
    lost = quality[quality.mean(axis=1).argmax()] - quality
    equal: npt.NDArray[np.bool_] = lost.mean(axis=1) <= lost.std(axis=1) / np.sqrt(quality.shape[1])
    return equal


def calibration_error(
    lists: RankLists, scores: npt.NDArray[np.float32], fit: Callable[[Scores, Labels], Calibration]
) -> float:
    """Expected calibration error: mean distance of predicted chance and share of hits over bins of equal size.

    fit: makes a calibration from scores and labels. Each half of the lists is judged by a calibration of the other
    half, because one fitted on the very rows would look better than it is. Needs two lists.
    Source: Naeini, Cooper and Hauskrecht 2015, section 2, with equal-mass bins.
    """
    half = lists.query_of_row() % 2 == 0
    chance = np.empty(len(scores), np.float64)
    for fitted, judged in ((half, ~half), (~half, half)):
        made = fit(scores[fitted], lists.label[fitted])
        chance[judged] = 1.0 / (1.0 + np.exp(-(made.slope * scores[judged] + made.intercept).astype(np.float64)))
    bins = np.array_split(np.argsort(chance, kind="stable"), _BINS)
    gaps = [len(b) * abs(float(chance[b].mean() - lists.label[b].mean())) for b in bins if len(b)]
    return float(sum(gaps)) / len(scores)
