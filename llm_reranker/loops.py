"""Compiled loops over rows, where torch would go over them once for each step. CPU, float32. Heavy: numba.

Shape legend: T tokens, I inputs, d head_dim, c = d / 2, H heads, E experts, K experts per token,
X rows sorted by expert.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.compiled.how import compiled

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_NOT_SIGN = np.int32(0x7FFFFFFF)
_TINY = np.float32(1e-12)  # of a row of zeros
_MAX, _ZERO = np.float32(127), np.int32(128)


@compiled
def quantized(x_TI: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Rows as unsigned 8-bit integers around 128, and what each row is to be multiplied with, [T, 1].

    Magnitudes are compared as the integers they are in memory: the order is the same, a compiler may go through it
    eight at a time, and NaN is the largest, so that a row with one comes out as NaN.
    """
    values_TI, scale_T1 = np.empty(x_TI.shape, np.uint8), np.empty((len(x_TI), 1), np.float32)
    bits_TI, scale_bits_T1 = x_TI.view(np.int32), scale_T1.view(np.int32)
    for t in range(x_TI.shape[0]):
        loudest = np.int32(0)
        for i in range(x_TI.shape[1]):
            loudest = max(loudest, bits_TI[t, i] & _NOT_SIGN)
        scale_bits_T1[t, 0] = loudest
        if scale_T1[t, 0] < _TINY:
            scale_T1[t, 0] = _TINY
        scale_T1[t, 0] /= _MAX
        factor = np.float32(1) / scale_T1[t, 0]
        for i in range(x_TI.shape[1]):
            values_TI[t, i] = np.int32(np.rint(x_TI[t, i] * factor)) + _ZERO
    return values_TI, scale_T1


@compiled
def norm_and_turn(x_THd: Floats, heads: int, weight_d: Floats, turn_T2c: Floats, eps: float) -> None:
    """RMSNorm, then RoPE, of the first `heads` of each token, in place. turn_T2c: cosines and sines of its position."""
    c = len(weight_d) // 2
    for t in range(x_THd.shape[0]):
        for h in range(heads):
            squares = np.float32(0)
            for i in range(2 * c):
                squares += x_THd[t, h, i] * x_THd[t, h, i]
            factor = np.float32(1) / np.sqrt(squares / np.float32(2 * c) + np.float32(eps))
            for i in range(c):
                a, b = x_THd[t, h, i] * factor * weight_d[i], x_THd[t, h, c + i] * factor * weight_d[c + i]
                x_THd[t, h, i] = a * turn_T2c[t, 0, i] - b * turn_T2c[t, 1, i]
                x_THd[t, h, c + i] = a * turn_T2c[t, 1, i] + b * turn_T2c[t, 0, i]
