"""[heavy] flat: the exact scan, for catalogues up to some ten thousand items. Shape legend: see engine.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import faiss

from recsys.candidates.nearest.base import Vectors
from recsys.candidates.nearest.engine import found, selector, view
from recsys.candidates.nearest.exact import Found
from recsys.candidates.nearest.rows import RowSet

KIND = "flat"


class FlatEngine:
    """IndexFlatIP."""

    kind = KIND
    tuned: Mapping[str, Any] = {}

    def __init__(self, index: Any) -> None:
        """index: IndexFlatIP."""
        self.index = index
        self.vectors: Vectors = view(index)

    @classmethod
    def build(cls, vectors_MD: Vectors) -> FlatEngine:
        """Over the vectors, in their order."""
        index = faiss.IndexFlatIP(vectors_MD.shape[1])
        index.add(vectors_MD)
        return cls(index)

    def search(self, queries_BD: Vectors, k: int, allowed: RowSet | None, num_allowed: int) -> Found:
        """See Engine."""
        make: Any = faiss.SearchParameters
        params = None if allowed is None else make(sel=selector(allowed))
        return found(self.index.search(queries_BD, k, params=params))
