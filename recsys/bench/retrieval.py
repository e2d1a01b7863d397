"""[heavy] Our ANN index against FAISS's exact scan, one query at a time, as a request asks.

limit: the vectors read once from memory per query, what an exact scan cannot beat. Vectors are drawn around centres, as
learned ones lie. Shape legend: M items, D dimension, Q queries, K neighbours.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from recsys.bench.harness import Contest, Row, figure, measure
from recsys.candidates.ann import EXACT_ITEMS_MAX, AnnIndex

_DIM, _K, _CENTRES = 64, 100, 200


def bench(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Searches per second, and the recall they come with."""
    items = 2_000 if quick else 2 * EXACT_ITEMS_MAX
    queries, repeats = (20, 2) if quick else (200, 7)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(_CENTRES, _DIM))
    drawn = centres[rng.integers(0, _CENTRES, items + queries)] + 0.5 * rng.normal(size=(items + queries, _DIM))
    vectors_MD, queries_QD = np.split(
        (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32), [items]
    )
    ours = AnnIndex.build(np.arange(items, dtype=np.int64), vectors_MD)
    exact = faiss.IndexFlatIP(_DIM)
    exact.add(vectors_MD)

    def search_ours() -> float:
        for query in queries_QD:
            ours.search(query[None], _K)
        return queries

    def search_exact() -> float:
        for query in queries_QD:
            exact.search(query[None], _K)
        return queries

    def read_all() -> float:
        for _ in range(queries):
            vectors_MD.max()
        return queries

    rows = measure(
        [
            Contest(
                what=f"searches, {items} items",
                unit="per_s",
                ours=("double11 AnnIndex", search_ours),
                peer=("faiss IndexFlatIP", search_exact),
                limit=("one pass over the vectors", read_all),
            )
        ],
        repeats=repeats,
    )
    found, true = ours.search(queries_QD, _K)[0], exact.search(queries_QD, _K)[1]
    recall = float(np.mean([len(np.intersect1d(a, b)) / _K for a, b in zip(found, true, strict=True)]))
    rows.append(figure(f"recall@{_K} of the exact neighbours", "share", recall, peer=1.0, limit=1.0))
    return {"items": items, "dim": _DIM, "k": _K, "queries": queries, "repeats": repeats}, rows
