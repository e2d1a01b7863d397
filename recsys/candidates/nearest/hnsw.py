"""[heavy] hnsw: a graph, for those who ask for it by name. Slow to build, quick to ask one query at a time.

Shape legend: see engine.py. Source: Malkov & Yashunin 2018; FAISS IndexHNSWFlat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import faiss
import numpy as np

from recsys.candidates.nearest.base import Vectors
from recsys.candidates.nearest.engine import INNER_PRODUCT, found, selector, view
from recsys.candidates.nearest.exact import Found, exact_search
from recsys.candidates.nearest.rows import Rows, RowSet
from recsys.candidates.nearest.tuning import Effort, Sample, doubling_grid, least_effort, not_reached, recall
from recsys.models.config import IndexConfig

KIND = "hnsw"
_LINKS, _EF_CONSTRUCTION, _EF_SEARCH_MAX = 32, 80, 4_096


class HnswEngine:
    """IndexHNSWFlat with the efSearch that reaches the recall target."""

    kind = KIND

    def __init__(self, index: Any, tuned: Mapping[str, Any]) -> None:
        """index: IndexHNSWFlat. tuned: {"ef_search", "recall"}."""
        self.index, self.tuned = index, tuned
        self.vectors: Vectors = view(faiss.downcast_index(index.storage))
        self._ef_search = int(tuned["ef_search"])

    @classmethod
    def build(cls, vectors_MD: Vectors, sample: Sample, config: IndexConfig) -> tuple[HnswEngine, Rows]:
        """Over the vectors, those that are asked for last; also gives for each row its place in `vectors_MD`."""
        asked = np.empty(0, np.int64) if sample.place is None else sample.place
        order = np.concatenate([np.setdiff1d(np.arange(len(vectors_MD)), asked, assume_unique=True), asked])
        index: Any = faiss.IndexHNSWFlat(vectors_MD.shape[1], _LINKS, INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        known = np.ascontiguousarray(vectors_MD[order[: len(order) - len(asked)]])
        index.add(known)
        tuned = _tune(index, known, sample.queries_QD, config)
        index.add(np.ascontiguousarray(vectors_MD[asked]))
        return cls(index, tuned), order

    def search(self, queries_BD: Vectors, k: int, allowed: RowSet | None, num_allowed: int) -> Found:
        """See Engine. A filter takes a wider search, in proportion to what it leaves out."""
        widen = 1.0 if allowed is None else len(self.vectors) / max(num_allowed, 1)
        ef = min(max(int(self._ef_search * widen), k), max(_EF_SEARCH_MAX, k))
        return found(self.index.search(queries_BD, k, params=_params(ef, allowed)))


def _tune(index: Any, known_MD: Vectors, queries_QD: Vectors, config: IndexConfig) -> dict[str, Any]:
    k = max(min(config.recall_k, len(known_MD)), 1)
    exact = exact_search(known_MD, queries_QD, k)[0]

    def search(ef: int) -> Found:
        return found(index.search(queries_QD, k, params=_params(ef, None)))

    grid = [e for e in doubling_grid(_EF_SEARCH_MAX) if e >= k] or [k]
    effort = least_effort(search, grid, exact, config.recall_target)
    if effort is None:
        effort = Effort(grid[-1], recall(search(grid[-1])[0], exact))
        not_reached(KIND, config.recall_target, effort.recall)
    return {"ef_search": effort.value, "recall": round(effort.recall, 4)}


def _params(ef: int, allowed: RowSet | None) -> Any:
    names: Any = faiss  # its stubs lack the class
    return names.SearchParametersHNSW(efSearch=ef, sel=selector(allowed))
