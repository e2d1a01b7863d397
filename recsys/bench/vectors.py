"""Seeded item vectors for benchmarks: a low-dimensional latent with noise, of length 1, drawn for any number of items.

Shape legend: N vectors, D dimension.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_LATENT, _NOISE = 16, 0.05
_ROWS_PER_BLOCK = 65_536


def made_vectors(n: int, dim: int = 64, *, part: int = 0, seed: int = 0) -> npt.NDArray[np.float32]:
    """N vectors [N, D]: 16 latent numbers mapped linearly to D and scaled to length 1, noise .05 on each coordinate,
    scaled to length 1 again. The noise is two fifths as long as the vector: what is near is not told by the latent.

    part: another part is drawn from the same space and shares no vector, e.g. queries never seen.
    """
    to_space = np.random.default_rng(seed).normal(size=(_LATENT, dim)).astype(np.float32)
    rng = np.random.default_rng([seed, part])
    out = np.empty((n, dim), np.float32)
    for at in range(0, n, _ROWS_PER_BLOCK):
        block = out[at : at + _ROWS_PER_BLOCK]
        block[:] = rng.normal(size=(len(block), _LATENT)).astype(np.float32) @ to_space
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        block += _NOISE * rng.normal(size=block.shape).astype(np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return out
