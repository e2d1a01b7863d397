"""Confidence intervals and paired tests by resampling users, and Holm's correction.

Users are the unit: queries of one user are not independent, so they are drawn together.
Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), sections 13.3 (percentile interval), 15
(permutation tests) and 16.4 (test of a mean, statistics centred on the estimate); Holm, "A simple sequentially
rejective multiple test procedure" (Scand. J. Statistics, 1979).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.core.errors import BadInput

SAMPLES = 2_000
_DRAWS_PER_CHUNK = 4_000_000  # bounds memory to 32 MB of indices

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedResult:
    """Mean of a - b, its 95 % interval and the two-sided p of "no difference"."""

    diff: float
    ci95: Interval
    p: float


def bootstrap_mean_ci(
    values: npt.ArrayLike, seed: int, *, users: Sequence[str] | None = None, samples: int = SAMPLES
) -> Interval:
    """95 % percentile interval of the mean of `values` [N] over resampled users.

    users: N user ids; None = every value is a user of its own.
    Raises: BadInput when there is no value, or one that is not finite.
    """
    means = _resampled_means(*_per_user(values, users), seed, samples)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, seed: int, *, users: Sequence[str] | None = None, samples: int = SAMPLES
) -> PairedResult:
    """Compare two arms on the same queries, in the same order: mean(a - b), its interval and p.

    p = share of resampled means, centred on the estimate, at least as far from 0 as it, counting the sample itself
    (so never 0: at least 1 / (samples + 1)). Of few users resampling knows too little, of one nothing: p is at least
    what the test of all signs would give if all n users who differ did so in one direction, 2 / 2^n, and where that
    alone is above 0.05 the interval reaches to 0.
    Raises: BadInput for different lengths, or as `bootstrap_mean_ci`.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise BadInput(
            "paired values", came=f"{first.shape} and {second.shape}", expected="one shape", fix="Pair by query."
        )
    total, count = _per_user(first - second, users)
    diff = float(total.sum() / count.sum())
    means = _resampled_means(total, count, seed, samples)
    low, high = np.quantile(means, [0.025, 0.975])
    extreme = np.abs(means - diff) >= abs(diff) - 1e-15
    of_signs = min(2.0 ** (1 - np.count_nonzero(total)), 1.0)
    if of_signs > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    resampled = (1 + np.count_nonzero(extreme)) / (samples + 1)
    return PairedResult(diff=diff, ci95=(float(low), float(high)), p=float(max(resampled, of_signs)))


def holm(pvalues: npt.ArrayLike) -> Floats:
    """Holm-adjusted p values, in the order given: reject at level alpha where the adjusted value is <= alpha.

    Raises: BadInput for a value outside [0, 1].
    """
    p = np.asarray(pvalues, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise BadInput("p values", came=pvalues, expected="a flat list of values in [0, 1]", fix="Check the test.")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _per_user(values: npt.ArrayLike, users: Sequence[str] | None) -> tuple[Floats, Floats]:
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not len(v) or not np.all(np.isfinite(v)) or (users is not None and len(users) != len(v)):
        raise BadInput(
            "bootstrap values", came=f"shape {v.shape}, finite {bool(np.all(np.isfinite(v)))}",
            expected="one finite number per query, one user each", fix="Measure every query first.",
        )  # fmt: skip
    if users is None:
        return v, np.ones(len(v))
    _, row = np.unique(np.asarray(users, dtype=str), return_inverse=True)
    return np.bincount(row, weights=v).astype(np.float64), np.bincount(row).astype(np.float64)


def _resampled_means(total: Floats, count: Floats, seed: int, samples: int) -> Floats:
    rng, n = np.random.default_rng(seed), len(total)
    means: list[Floats] = []
    for size in _chunks(samples, max(1, _DRAWS_PER_CHUNK // n)):
        drawn = rng.integers(0, n, size=(size, n))
        means.append(total[drawn].sum(axis=1) / count[drawn].sum(axis=1))
    return np.concatenate(means)


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
