"""Off-policy estimators: what a policy would have earned, from the log of another with known propensities.

Source: Horvitz and Thompson (JASA 1952) for IPS; Swaminathan and Joachims, "The Self-Normalized Estimator for
Counterfactual Learning" (NeurIPS 2015) for SNIPS; Dudík, Langford and Li, "Doubly Robust Policy Evaluation and
Learning" (ICML 2011), equation 3, for DR. Shape legend: N logged rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.core.errors import BadInput
from recsys.evaluation import Interval

_Z95 = 1.959964

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Mean reward per round of the evaluated policy.

    ci95: normal interval by the (linearised) standard error. effective_rounds: Kish's (sum w)^2 / sum w^2; far below
    the number of rounds, the two policies hardly overlap and the figure is not to be trusted.
    """

    value: float
    ci95: Interval
    effective_rounds: float


def ips(reward: npt.ArrayLike, logged: npt.ArrayLike, evaluated: npt.ArrayLike) -> Estimate:
    """Inverse propensity score: mean(w r), w = evaluated / logged. Unbiased where `logged` covers `evaluated`.

    reward: [N]. logged, evaluated: [N], each policy's probability of the logged action in its context.
    Raises: BadInput for arrays of different lengths, no rounds, propensities outside (0, 1], or non-finite rewards.
    """
    r, w = _checked(reward, logged, evaluated)
    return _estimate(w * r, w)


def snips(reward: npt.ArrayLike, logged: npt.ArrayLike, evaluated: npt.ArrayLike) -> Estimate:
    """Self-normalised IPS: sum(w r) / sum(w). A little bias for much less variance; stays within the rewards' range.

    Arguments and errors as `ips`; also BadInput when every weight is 0.
    """
    r, w = _checked(reward, logged, evaluated)
    if not w.any():
        raise BadInput(
            "evaluated propensities", came="all 0", expected="some overlap with the log", fix="Log with exploration."
        )
    value = float((w * r).sum() / w.sum())
    return _estimate(value + w * (r - value) / w.mean(), w)


def doubly_robust(
    reward: npt.ArrayLike,
    logged: npt.ArrayLike,
    evaluated: npt.ArrayLike,
    predicted: npt.ArrayLike,
    predicted_policy: npt.ArrayLike,
) -> Estimate:
    """Mean(v + w (r - q)): a reward model corrected by IPS; right when either of the two is.

    predicted: q [N], the model's reward of the logged action. predicted_policy: v [N], its expectation over the
    evaluated policy's actions in that context. Fit the model on other rounds. Errors as `ips`.
    """
    r, w = _checked(reward, logged, evaluated)
    q, v = np.asarray(predicted, np.float64), np.asarray(predicted_policy, np.float64)
    if q.shape != r.shape or v.shape != r.shape or not np.all(np.isfinite(q) & np.isfinite(v)):
        raise BadInput("reward model", came=f"shapes {q.shape}, {v.shape}", expected=f"finite {r.shape}", fix="Refit.")
    return _estimate(v + w * (r - q), w)


def _checked(reward: npt.ArrayLike, logged: npt.ArrayLike, evaluated: npt.ArrayLike) -> tuple[Floats, Floats]:
    r, p, e = (np.asarray(a, np.float64) for a in (reward, logged, evaluated))
    if r.ndim != 1 or not len(r) or r.shape != p.shape or r.shape != e.shape or not np.all(np.isfinite(r)):
        raise BadInput(
            "logged rounds", came=f"shapes {r.shape}, {p.shape}, {e.shape}", expected="finite arrays of one length > 0",
            fix="Drop rounds without a reward or a propensity.",
        )  # fmt: skip
    if not (np.all((p > 0) & (p <= 1)) and np.all((e >= 0) & (e <= 1))):
        raise BadInput(
            "propensities", came=f"logged {p.min()} to {p.max()}, evaluated {e.min()} to {e.max()}",
            expected="logged in (0, 1], evaluated in [0, 1]", fix="Log the probability of what was shown where it was.",
        )  # fmt: skip
    return r, e / p


def _estimate(terms: Floats, w: Floats) -> Estimate:
    value = float(terms.mean())
    half = _Z95 * float(terms.std(ddof=1)) / len(terms) ** 0.5 if len(terms) > 1 else float("inf")
    square = float((w * w).sum())
    effective = float(w.sum()) ** 2 / square if square else 0.0
    return Estimate(value=value, ci95=(value - half, value + half), effective_rounds=effective)
