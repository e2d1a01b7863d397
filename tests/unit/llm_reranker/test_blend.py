"""The final order of the ranker's and the reranker's scores."""

from __future__ import annotations

import numpy as np
import pytest

from llm_reranker.blend import blend

RANK = np.array([3.0, 2.0, 1.0, 0.0], np.float32)


def order(scores: np.ndarray) -> list[int]:
    return np.argsort(-scores, kind="stable").tolist()


@pytest.mark.parametrize(
    ("rerank", "weight", "expected"),
    [
        ([0, 1, 2, 3], 0.0, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 1.0, [3, 2, 1, 0]),
        ([5, 5, 5, 5], 1.0, None),  # a constant reranker says nothing ...
        ([5, 5, 5, 5], 0.7, [0, 1, 2, 3]),  # ... and leaves the ranker's order
        ([np.nan] * 4, 0.9, [0, 1, 2, 3]),
        ([0, 9, np.nan, np.nan], 1.0, [1, 0, 2, 3]),  # not reached: after those that were, in the ranker's order
        ([-100, -200, np.nan, np.inf], 0.5, [0, 1, 2, 3]),
    ],
)
def test_orders(rerank: list[float], weight: float, expected: list[int] | None) -> None:
    final = blend(RANK, np.array(rerank, np.float32), weight)
    assert final.dtype == np.float32
    assert np.isfinite(final).all()
    if expected is not None:
        assert order(final) == expected


def test_scales_do_not_matter() -> None:
    rerank = np.array([1.0, 3.0, 2.0, 0.0], np.float32)
    a, b = blend(RANK, rerank, 0.4), blend(RANK * 100 - 7, rerank * 0.01 + 5, 0.4)
    assert a == pytest.approx(b, abs=1e-4)


def test_candidates_beyond_the_depth_do_not_change_the_order_of_those_within() -> None:
    rng = np.random.default_rng(0)
    rank, rerank = np.sort(rng.normal(size=20))[::-1].astype(np.float32), rng.normal(size=20).astype(np.float32)
    alone = order(blend(rank, rerank, 0.5))
    tail = np.linspace(rank.min() - 1, -500, 300, dtype=np.float32)
    whole = blend(np.concatenate([rank, tail]), np.concatenate([rerank, np.full(300, np.nan, np.float32)]), 0.5)
    assert order(whole) == [*alone, *range(20, 320)]


def test_empty_and_missing_ranks() -> None:
    assert blend(np.empty(0, np.float32), np.empty(0, np.float32), 0.5).shape == (0,)
    final = blend(np.array([1, np.nan, 2], np.float32), np.array([0, 0, 0], np.float32), 0.5)
    assert order(final) == [2, 0, 1]
