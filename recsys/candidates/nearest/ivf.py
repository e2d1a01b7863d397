"""[heavy] ivf: inverted lists of 4-bit product codes scanned in registers, the best rescored with the vectors.

Rows are kept in the order of their lists: what is rescored lies close together, and how many rows of a filter each
list holds is one population count. How far a search goes is said in rows to scan, S(k): tuned for some k against the
exact scan, between and beyond them a straight line in logarithms. A filter that leaves a share p of the rows asks for
neighbours as far away as the best k / p of all, so it scans until p S(k / p) rows that it admits are behind it, and
never fewer lists than without it: where its rows lie close together, a search without it would do.

Shape legend: see engine.py; L lists. Source: Jégou et al. 2011 (IVFADC); André et al. 2015 (PQ Fast Scan); FAISS
IndexIVFPQFastScan, IndexRefine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import faiss
import numpy as np

from recsys.candidates.nearest.base import Vectors
from recsys.candidates.nearest.engine import INNER_PRODUCT, found, selector, view
from recsys.candidates.nearest.exact import Found, exact_search, products
from recsys.candidates.nearest.rows import Rows, RowSet
from recsys.candidates.nearest.tuning import Effort, Sample, doubling_grid, least_effort, not_reached
from recsys.models.config import IndexConfig

KIND = "ivf"
_BITS, _SUBQUANTIZERS_MAX = 4, 64
_TRAINING_ROWS_PER_LIST, _ROWS_PER_BLOCK = 64, 65_536
_K_FACTORS = (1, 2, 4, 8, 16)
_NEARLY_ALL = 0.9  # from this share on a filter is a few tombstones: wherever they are, they hide no list
_DEEPER = (4, 16)  # S(k) is tuned at these multiples of recall_k too
# What a search costs, in rows scanned: rescoring one row is one cache miss or two. Measured once, see docs/log.md.
_ROWS_PER_RESCORED = 130.0


class IvfEngine:
    """IndexRefine(IndexIVFPQFastScan, IndexFlatIP)."""

    kind = KIND

    def __init__(self, index: Any, tuned: Mapping[str, Any]) -> None:
        """index: the IndexRefine. tuned: {"k_factor", "recall_k", "scan": [[k, rows], ...], "recall"}."""
        self.index, self.tuned = index, tuned
        self._ivf = _inner(index)
        self.vectors: Vectors = view(faiss.downcast_index(index.refine_index))
        self._num_lists = int(self._ivf.nlist)
        centroids = self._ivf.quantizer.reconstruct_n(0, self._num_lists)
        self._centroids_LD: Vectors = np.ascontiguousarray(centroids)
        sizes = [self._ivf.invlists.list_size(i) for i in range(self._num_lists)]
        self._list_start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        points = np.array(tuned["scan"], np.float64)
        self._scan_k, self._scan_rows = np.log(points[:, 0]), np.log(points[:, 1])

    @classmethod
    def build(
        cls, vectors_MD: Vectors, sample: Sample, config: IndexConfig, like: IvfEngine | None = None, share: float = 1.0
    ) -> tuple[IvfEngine, Rows]:
        """Over the vectors; also gives for each row of the engine its place in `vectors_MD`.

        like: an engine whose quantizers and tuning are used again: seconds instead of a training. share: these rows are
        that share of its own, drawn by chance: the best k of them are among the best k / share of all.
        """
        ivf = _empty(vectors_MD) if like is None else faiss.clone_index(like._ivf)
        if like is not None:
            ivf.reset()
        order = _order_of_lists(ivf, vectors_MD)
        refine = faiss.IndexFlatIP(vectors_MD.shape[1])
        for at in range(0, len(order), _ROWS_PER_BLOCK):
            block = np.ascontiguousarray(vectors_MD[order[at : at + _ROWS_PER_BLOCK]])
            ivf.add(block)
            refine.add(block)
        index: Any = faiss.IndexRefine(ivf, refine)
        index.referenced_objects = [ivf, refine]  # FAISS holds bare pointers to both
        tuned = _tune(index, order, sample, config) if like is None else _of_share(like.tuned, share)
        return cls(index, tuned), order

    def search(self, queries_BD: Vectors, k: int, allowed: RowSet | None, num_allowed: int) -> Found:
        """See Engine."""
        lists = self._lists(self._scan(k))
        if num_allowed >= _NEARLY_ALL * len(self.vectors):
            lists = self._lists(self._scan(k * len(self.vectors) / num_allowed))
        elif allowed is not None:
            lists = max(lists, self._lists_for(queries_BD, k, allowed, num_allowed))
        factor = self.tuned["k_factor"] * max(1.0, self.tuned["recall_k"] / k)
        return _search(self.index, queries_BD, k, lists, factor, allowed)

    def _scan(self, k: float) -> float:
        """S(k): rows to scan for the best k of all."""
        log_k, x, y = np.log(k), self._scan_k, self._scan_rows
        if log_k <= x[0]:
            return float(np.exp(y[0]))
        if log_k >= x[-1] and len(x) > 1:
            slope = np.clip((y[-1] - y[-2]) / (x[-1] - x[-2]), 0.25, 1.0)
            return float(np.exp(y[-1] + slope * (log_k - x[-1])))
        return float(np.exp(np.interp(log_k, x, y)))

    def _lists(self, rows: float) -> int:
        average = max(len(self.vectors) / self._num_lists, 1.0)
        return int(min(np.ceil(rows / average), self._num_lists))

    def _lists_for(self, queries_BD: Vectors, k: int, allowed: RowSet, num_allowed: int) -> int:
        """Lists to visit, the nearest first, until enough allowed rows are behind; the most that a query needs."""
        share = num_allowed / max(len(self.vectors), 1)
        need = share * self._scan(k / share)
        held = allowed.count_between(self._list_start)
        nearest = np.argsort(-products(queries_BD, self._centroids_LD), axis=1)
        behind = np.cumsum(held[nearest], axis=1)
        return int(min((behind < need).sum(axis=1).max() + 1, self._num_lists))


def _empty(vectors_MD: Vectors) -> Any:
    """Trained quantizers and no rows."""
    items, dim = vectors_MD.shape
    lists = 1 << max(int(np.round(np.log2(np.sqrt(max(items, 1))))), 0)
    subquantizers = max(m for m in range(1, min(dim, _SUBQUANTIZERS_MAX) + 1) if dim % m == 0)
    quantizer = faiss.IndexFlatIP(dim)
    ivf: Any = faiss.IndexIVFPQFastScan(quantizer, dim, lists, subquantizers, _BITS, INNER_PRODUCT)
    ivf.referenced_objects = [quantizer]
    ivf.by_residual = True
    sample = np.random.default_rng(0).permutation(items)[: max(lists * _TRAINING_ROWS_PER_LIST, 4_096)]
    ivf.train(np.ascontiguousarray(vectors_MD[np.sort(sample)]))
    return ivf


def _order_of_lists(ivf: Any, vectors_MD: Vectors) -> Rows:
    blocks = [
        ivf.quantizer.search(np.ascontiguousarray(vectors_MD[at : at + _ROWS_PER_BLOCK]), 1)[1][:, 0]
        for at in range(0, len(vectors_MD), _ROWS_PER_BLOCK)
    ]
    return np.argsort(np.concatenate(blocks), kind="stable")


def _search(index: Any, queries_BD: Vectors, k: int, lists: int, factor: float, allowed: RowSet | None) -> Found:
    of_lists: Any = faiss.IVFSearchParameters
    of_rescoring: Any = faiss.IndexRefineSearchParameters
    params = of_rescoring(k_factor=float(factor), base_index_params=of_lists(nprobe=lists, sel=selector(allowed)))
    return found(index.search(queries_BD, k, params=params))


def _inner(index: Any) -> Any:
    """The inverted lists of an IndexRefine."""
    return faiss.downcast_index(index.base_index)


def _tune(index: Any, order: Rows, sample: Sample, config: IndexConfig) -> dict[str, Any]:
    """The k_factor and S(recall_k) of the least modelled cost, then S at deeper k with that k_factor."""
    items, lists = len(order), int(_inner(index).nlist)
    k, average, grid = min(config.recall_k, items), items / lists, doubling_grid(lists)
    deeper = [k * times for times in _DEEPER if k * times < items]
    exact = _exact_without_themselves(index, order, sample, max([k, *deeper]))

    def least(k: int, factor: int, grid: Sequence[int]) -> Effort | None:
        def search(lists: int) -> Found:  # one more: the query itself takes a place
            return _search(index, sample.queries_QD, min(k + 1, items), lists, factor, None)

        return least_effort(search, grid, exact[:, :k], config.recall_target)

    reached = [(factor, effort) for factor in _K_FACTORS if (effort := least(k, factor, grid)) is not None]
    if not reached:
        not_reached(KIND, config.recall_target, 0.0)
        reached = [(_K_FACTORS[-1], Effort(lists, 0.0))]
    factor, effort = min(reached, key=lambda r: r[1].value * average + r[0] * k * _ROWS_PER_RESCORED)
    scan = [[k, effort.value * average]]
    for deep_k in deeper:
        deep = least(deep_k, factor, [g for g in grid if g * average >= scan[-1][1]])
        scan.append([deep_k, average * (deep.value if deep is not None else lists)])
    return {"k_factor": factor, "recall_k": k, "scan": scan, "recall": round(effort.recall, 4)}


def _of_share(tuned: Mapping[str, Any], share: float) -> Mapping[str, Any]:
    return {**tuned, "scan": [[k * share, rows * share] for k, rows in tuned["scan"]]}


def _exact_without_themselves(index: Any, order: Rows, sample: Sample, k: int) -> Rows:
    """Rows [Q, k] of the exact neighbours; an item that is asked with is none of its own."""
    vectors = view(faiss.downcast_index(index.refine_index))
    if sample.place is None:
        return exact_search(vectors, sample.queries_QD, k)[0]
    rows = exact_search(vectors, sample.queries_QD, k + 1)[0]
    own = np.argsort(order)[sample.place]
    last = np.argsort(rows == own[:, None], axis=1, kind="stable")
    return np.take_along_axis(rows, last, axis=1)[:, :k]
