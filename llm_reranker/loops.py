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


@compiled
def best_experts(logit_TE: Floats, per_token: int, normed: bool) -> tuple[Floats, Ints, Ints]:
    """Each token's best experts, best first, with weights by softmax of all or (`normed`) of the best, [T, K].

    Then how many tokens each expert has, [E]. Of a token without numbers the weights are NaN.
    """
    (tokens, experts), left_E = logit_TE.shape, np.empty(logit_TE.shape[1], np.float32)
    weight_TK, expert_TK = np.empty((tokens, per_token), np.float32), np.empty((tokens, per_token), np.int64)
    count_E = np.zeros(experts, np.int64)
    for t in range(tokens):
        left_E[:] = logit_TE[t]
        for k in range(per_token):
            best, most = 0, left_E[0]
            for e in range(1, experts):  # both chosen without a branch: which one is larger cannot be foreseen
                more = left_E[e] > most
                best, most = e if more else best, left_E[e] if more else most
            expert_TK[t, k], weight_TK[t, k], left_E[best] = best, most, -np.inf
            count_E[best] += 1
        top, total = weight_TK[t, 0], np.float32(0)
        for k in range(per_token):
            weight_TK[t, k] = np.exp(weight_TK[t, k] - top)
            total += weight_TK[t, k]
        if not normed:
            total = np.float32(0)
            for e in range(experts):
                total += np.exp(logit_TE[t, e] - top)
        weight_TK[t] /= total
    return weight_TK, expert_TK, count_E


@compiled
def sorted_by_expert(expert_TK: Ints, start_E: Ints, rows: int) -> tuple[Ints, Ints]:
    """Token of each row [X] (0 where filled up), and place in X of each assignment [T, K]; experts start at start_E."""
    row_X, place_TK, next_E = np.zeros(rows, np.int64), np.empty_like(expert_TK), start_E.copy()
    for t in range(expert_TK.shape[0]):
        for k in range(expert_TK.shape[1]):
            place = next_E[expert_TK[t, k]]
            next_E[expert_TK[t, k]] += 1
            row_X[place], place_TK[t, k] = t, place
    return row_X, place_TK
