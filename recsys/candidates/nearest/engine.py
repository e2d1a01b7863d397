"""[heavy] What stands behind an AnnIndex: FAISS over row numbers 0 to M - 1, one variant per file.

Shape legend: M rows, B queries, D dimension, K neighbours.
Traps kept away from: HNSW cannot forget rows (faiss#3339, #1781), so nothing is ever removed from a FAISS index; an
HNSW search with bounded_queue=False ignores the selector (faiss#5504), so it stays True; IndexShardsIVF drops the
selector (faiss#5584), so shards are merged here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import faiss
import numpy as np

from recsys.candidates.nearest.base import Vectors
from recsys.candidates.nearest.exact import Found
from recsys.candidates.nearest.rows import RowSet

INNER_PRODUCT = faiss.METRIC_INNER_PRODUCT
_NICENESS = 10


def yield_cores(num_threads: int) -> None:
    """Let this thread use so many cores in FAISS, and only while searches leave them idle.

    OpenMP counts threads per calling thread: one that does not say takes all cores.
    """
    faiss.omp_set_num_threads(num_threads)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # of a thread on Linux


class Engine(Protocol):
    """Search over rows. Immutable once built, so that any number of threads may ask."""

    @property
    def kind(self) -> str:
        """flat, hnsw, ivf or gpu."""
        ...

    @property
    def index(self) -> Any:
        """The FAISS index, as ann.faiss keeps it."""
        ...

    @property
    def vectors(self) -> Vectors:
        """[M, D] of the rows: a view, never written to."""
        ...

    @property
    def tuned(self) -> Mapping[str, Any]:
        """Parameters found at build time, for ann.json; empty for an exact index."""
        ...

    def search(self, queries_BD: Vectors, k: int, allowed: RowSet | None, num_allowed: int) -> Found:
        """Rows [B, k], all of them in `allowed` (None = all M), and scores, best first; -1 where none was found.

        May find fewer than there are: the caller looks.
        """
        ...


def view(flat: Any) -> Vectors:
    """The vectors of an IndexFlat, without a copy; keep the index alive as long as the view."""
    size = flat.ntotal * flat.d
    if not size:
        return np.empty((0, flat.d), np.float32)
    rows: Vectors = faiss.rev_swig_ptr(flat.get_xb(), size).reshape(flat.ntotal, flat.d)
    return rows


def selector(allowed: RowSet | None) -> Any:
    """FAISS's selector of the rows; it looks at the set's own bits. None for all rows."""
    of_bits: Any = faiss.IDSelectorBitmap
    return None if allowed is None else of_bits(allowed.bits)


def found(answer: tuple[Vectors, Any]) -> Found:
    """FAISS's (scores, rows) in our order, with -inf where nothing was found."""
    scores, rows = answer
    scores[rows < 0] = -np.inf
    return rows, scores
