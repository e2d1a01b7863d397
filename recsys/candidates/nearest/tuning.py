"""[heavy] Search parameters found at build time: the cheapest that reach a recall against the exact scan.

Costs are modelled, not timed: the same vectors give the same index on every machine and day, which the truncation test
of the replay protocol asks for. Shape legend: Q sample queries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recsys.candidates.nearest.base import Vectors
from recsys.candidates.nearest.exact import Found
from recsys.candidates.nearest.rows import Rows
from recsys.core.logging import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Queries [Q, D] to tune on. place: which of the items each one is [Q]; None when they are no items.

    An item is no honest query of an index that holds it: whoever tunes leaves it out.
    """

    queries_QD: Vectors
    place: Rows | None

    @classmethod
    def draw(cls, vectors_MD: Vectors, queries: Vectors | None, num: int) -> Sample:
        """`num` of the queries, or of the items where there are none; the same every time."""
        source = vectors_MD if queries is None else queries
        drawn = np.sort(np.random.default_rng(0).permutation(len(source))[:num])
        chosen = np.ascontiguousarray(source[drawn], np.float32)
        return cls(queries_QD=chosen, place=drawn if queries is None else None)


@dataclass(frozen=True, slots=True)
class Effort:
    """The least effort on a grid that reaches the target, and the recall it comes with."""

    value: int
    recall: float


def recall(rows_QK: Rows, exact_QK: Rows) -> float:
    """Share of the exact neighbours that were found, mean over the queries; 1.0 where there are none to find."""
    shares = [
        np.isin(exact[exact >= 0], rows).mean() for rows, exact in zip(rows_QK, exact_QK, strict=True) if exact[0] >= 0
    ]
    return float(np.mean(shares)) if shares else 1.0


def least_effort(search: Callable[[int], Found], grid: Sequence[int], exact_QK: Rows, target: float) -> Effort | None:
    """Bisect the ascending grid for the smallest effort that reaches `target`; None when the greatest does not."""
    low, high, best = 0, len(grid) - 1, None
    while low <= high:
        middle = (low + high) // 2
        reached = recall(search(grid[middle])[0], exact_QK)
        if reached >= target:
            best, high = Effort(grid[middle], reached), middle - 1
        else:
            low = middle + 1
    return best


def doubling_grid(greatest: int, steps_per_doubling: int = 3) -> list[int]:
    """1 to `greatest`, `steps_per_doubling` values from one power of two to the next."""
    steps = int(np.ceil(np.log2(max(greatest, 1)) * steps_per_doubling)) + 1
    values = np.minimum(np.round(2 ** (np.arange(steps) / steps_per_doubling)), greatest).astype(int)
    return sorted({*values.tolist(), greatest})


def not_reached(kind: str, target: float, best: float) -> None:
    """Say that an index stays below its target."""
    _log.warning("recall_target_not_reached", kind=kind, target=target, best=best)
