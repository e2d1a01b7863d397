"""Arrival times of an open loop: a Poisson process whose rate follows a shape.

The server's speed has no say in them: a slow answer delays nobody's next request, as in life.
Source: Lewis & Shedler 1979 (inversion of the cumulative rate for non-homogeneous Poisson processes); Schroeder,
Wierman, Harchol-Balter, "Open Versus Closed" (NSDI 2006).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from recsys.core import BadInput

PEAK_FACTOR = 10.0  # WeChat plans for ten times the usual at festivals
Knots = tuple[tuple[float, float], ...]  # (share of the duration, multiple of the rate), linear in between

SHAPES: Mapping[str, Knots] = {
    "const": ((0.0, 1.0), (1.0, 1.0)),
    # a third quiet, a third at ten times, a third quiet: shows the fall and the recovery
    "step": ((0.0, 1.0), (1 / 3, 1.0), (1 / 3, PEAK_FACTOR), (2 / 3, PEAK_FACTOR), (2 / 3, 1.0), (1.0, 1.0)),
    # carts are filled before midnight (at .4), the peak comes shortly after it and ebbs away
    "double11": ((0.0, 1.0), (0.2, 1.0), (0.4, 2.0), (0.4, 8.0), (0.45, PEAK_FACTOR), (0.6, 4.0), (1.0, 2.0)),
}
_RATE_PER_S_MAX, _DURATION_S_MAX, _ARRIVALS_MAX = 100_000.0, 86_400.0, 20_000_000


def arrivals(shape: str, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Intended send times in seconds from the start, sorted, float64 [N].

    rate_per_s: of quiet time; the shape multiplies it.
    Raises: BadInput for an unknown shape or a rate or duration out of range.
    """
    if shape not in SHAPES:
        raise BadInput("--shape", came=shape, expected=f"one of {', '.join(SHAPES)}", fix="Choose one of them.")
    for name, value, high in (("--rate", rate_per_s, _RATE_PER_S_MAX), ("--duration", duration_s, _DURATION_S_MAX)):
        if not 0 < value <= high:
            raise BadInput(name, came=value, expected=f"above 0, at most {high:g}", fix="Correct it.")
    at = np.array([k[0] for k in SHAPES[shape]]) * duration_s
    rate = np.array([k[1] for k in SHAPES[shape]]) * rate_per_s
    # fine steps between the knots, so that inverting the integral by interpolation follows the ramps
    grid = np.unique(np.concatenate([at, np.linspace(0.0, duration_s, 2_001)]))
    middle_rate = np.interp((grid[1:] + grid[:-1]) / 2, at, rate)
    expected = np.concatenate([[0.0], np.cumsum(middle_rate * np.diff(grid))])
    if expected[-1] > _ARRIVALS_MAX:
        raise BadInput("--rate x --duration", came=f"{expected[-1]:.0f} requests", expected=f"at most {_ARRIVALS_MAX}",
                       fix="Run shorter.")  # fmt: skip
    drawn = np.sort(rng.uniform(0.0, expected[-1], rng.poisson(expected[-1])))
    intended_s: npt.NDArray[np.float64] = np.interp(drawn, expected, grid)
    return intended_s
