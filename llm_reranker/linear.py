"""Matrix products with weights that never change: float32, or int8 packed once for the machine. Heavy: torch.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["fp32", "int8"]
# x_TI -> y_TO
Linear = Callable[[Tensor], Tensor]

_INT8_MAX = 127.0
_TINY = 1e-12  # of a row of zeros


class Float32Linear:
    """y = x W^T in float32."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._weight_OI = weight_OI

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        return F.linear(x_TI, self._weight_OI)


class Int8Linear:
    """y = x W^T with 8-bit weights, a scale per output, and 8-bit inputs, a scale per token; sums are 32-bit integers.

    Every row is brought to the range [-1, 1] first, so the kernel's one scale for all of x is as fine for a quiet token
    as for a loud one. Without VNNI the kernel adds pairs of products in 16 bits: there one bit less of x is used.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        scale_O = weight_OI.abs().amax(1).clamp_min(_TINY).double() / _INT8_MAX
        with warnings.catch_warnings():
            # Quantized tensors may leave a later torch; the pinned one has them (pytorch issue 184982).
            warnings.filterwarnings("ignore", message=".*torch.quantize_per")
            zero_O = torch.zeros(len(scale_O), dtype=torch.long)
            quantized_OI = torch.quantize_per_channel(weight_OI, scale_O, zero_O, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantized_OI, None)
        self._reduce_range = not has_vnni()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, I] to [T, O]."""
        loudest_T1 = x_TI.abs().amax(1, keepdim=True).clamp_min_(_TINY)
        y_TO: Tensor = torch.ops.quantized.linear_dynamic(x_TI / loudest_T1, self._packed, self._reduce_range)
        return y_TO.mul_(loudest_T1)


def has_vnni() -> bool:
    """Whether this machine multiplies 8-bit integers into 32-bit sums in one instruction."""
    return bool(torch.cpu._is_vnni_supported())


def linear(weight_OI: Tensor, precision: Precision) -> Linear:
    """The product with this weight in this precision."""
    return Int8Linear(weight_OI) if precision == "int8" else Float32Linear(weight_OI)
