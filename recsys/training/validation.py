"""Measures of ranked lists on the validation window, beside the simplest order of the same candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recsys.training.rank_lists import RankLists

_K = 10


def list_measures(lists: RankLists, scores: npt.NDArray[np.float32]) -> dict[str, float]:
    """NDCG@10 of the ranker and of own history, the share of relevant items found, calibration error, queries.

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
