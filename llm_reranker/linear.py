"""Matrix products with weights that never change, packed once for the machine they run on. Heavy: torch.

What runs is chosen when a weight is packed, by what the processor has (`kernels` says it): oneDNN's packed products,
which use AVX-512 and VNNI on any maker's processor, where plain ones (MKL) do so only on Intel's. int8 without VNNI is
fbgemm's; what has no oneDNN gets plain products.

A packed product costs as much again when it first meets a number of rows, because oneDNN writes machine code for it.
So rows are filled up to few sizes: `padded_rows`.

Shape legend: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_reranker.loops import quantized

Precision = Literal["fp32", "int8", "bf16"]

_INT8_MAX = 127.0
_ZERO = 128  # what stands for 0 in inputs, unsigned as VNNI wants them: see loops.quantized
_TINY = 1e-12  # of a row of zeros
_ROWS_STEP = 8


class Inputs(NamedTuple):
    """Rows as a product takes them. scale_T1: what 8-bit rows are to be multiplied with; None for floats."""

    values_TI: Tensor
    scale_T1: Tensor | None

    def rows(self, row_A: Tensor) -> Inputs:
        """The rows at these places."""
        scale = None if self.scale_T1 is None else self.scale_T1.index_select(0, row_A)
        return Inputs(self.values_TI.index_select(0, row_A), scale)

    def part(self, start: int, stop: int) -> Inputs:
        """Rows `start` to `stop`."""
        return Inputs(self.values_TI[start:stop], None if self.scale_T1 is None else self.scale_T1[start:stop])


class Linear(Protocol):
    """y = x W^T. `inputs` once, then `product`, is what a caller that selects rows or has several weights does."""

    def inputs(self, x_TI: Tensor) -> Inputs:
        """Floats as this product, and any other of its kind, takes them: T is filled up where that is cheaper."""
        ...

    def product(self, x: Inputs) -> Tensor:
        """[T, I] to [T, O], filled up rows too; T as `padded_rows` gives it is cheapest."""
        ...

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Both steps, for any T."""
        ...


class PlainLinear:
    """As torch multiplies, in the weight's own precision and on its device."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._weight_OI = weight_OI

    def inputs(self, x_TI: Tensor) -> Inputs:
        """See Linear."""
        return Inputs(x_TI, None)

    def product(self, x: Inputs) -> Tensor:
        """See Linear."""
        return F.linear(x.values_TI, self._weight_OI)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See Linear."""
        return F.linear(x_TI, self._weight_OI)


class PackedLinear:
    """float32, packed for oneDNN."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)

    def inputs(self, x_TI: Tensor) -> Inputs:
        """See Linear."""
        return Inputs(_filled(x_TI), None)

    def product(self, x: Inputs) -> Tensor:
        """See Linear."""
        y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x.values_TI, self._packed, None, "none", [], "")
        return y_TO

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See Linear."""
        return self.product(self.inputs(x_TI))[: len(x_TI)]


class PackedInt8Linear:
    """8-bit weights, a scale per output, and 8-bit inputs, a scale per token; 32-bit sums: VNNI through oneDNN."""

    def __init__(self, weight_OI: Tensor) -> None:
        scale_O = weight_OI.abs().amax(1).clamp_min(_TINY) / _INT8_MAX
        quantized_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(quantized_OI, None)
        self._scale_O, self._zero_O = scale_O.float(), torch.zeros(len(scale_O), dtype=torch.int32)

    def inputs(self, x_TI: Tensor) -> Inputs:
        """See Linear. A scale of its own keeps a quiet token as fine as a loud one, whoever shares its batch."""
        values_TI, scale_T1 = quantized(_filled(x_TI).contiguous().numpy())
        return Inputs(torch.from_numpy(values_TI), torch.from_numpy(scale_T1))

    def product(self, x: Inputs) -> Tensor:
        """See Linear."""
        assert x.scale_T1 is not None
        y_TO: Tensor = torch.ops.onednn.qlinear_pointwise(
            x.values_TI, 1.0, _ZERO, self._packed, self._scale_O, self._zero_O, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y_TO.mul_(x.scale_T1)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See Linear."""
        return self.product(self.inputs(x_TI))[: len(x_TI)]


class FbgemmInt8Linear:
    """The same without VNNI.

    Every row is brought to the range [-1, 1] first, so the kernel's one scale for all of x is as fine for a quiet token
    as for a loud one. The kernel adds pairs of products in 16 bits: one bit less of x is used.
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

    def inputs(self, x_TI: Tensor) -> Inputs:
        """See Linear."""
        loudest_T1 = x_TI.abs().amax(1, keepdim=True).clamp_min_(_TINY)
        return Inputs(x_TI / loudest_T1, loudest_T1)

    def product(self, x: Inputs) -> Tensor:
        """See Linear."""
        assert x.scale_T1 is not None
        y_TO: Tensor = torch.ops.quantized.linear_dynamic(x.values_TI, self._packed, self._reduce_range)
        return y_TO.mul_(x.scale_T1)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """See Linear."""
        return self.product(self.inputs(x_TI))


def padded_rows(rows: int) -> int:
    """The size up to which rows are filled: at most 112 of them below 8,192, and 7 % more rows from 128 on."""
    step = max(_ROWS_STEP, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def linear(weight_OI: Tensor, precision: Precision) -> Linear:
    """The product with this weight in this precision; for bf16 the weight is cast."""
    if precision == "bf16":
        return PlainLinear(weight_OI.to(torch.bfloat16))
    if not has_packed(weight_OI.device):
        return FbgemmInt8Linear(weight_OI) if precision == "int8" else PlainLinear(weight_OI)
    if precision == "int8":
        return PackedInt8Linear(weight_OI) if has_vnni() else FbgemmInt8Linear(weight_OI)
    return PackedLinear(weight_OI)


def product(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """The product x W^T with a weight that is used once, float32, by oneDNN: see `has_packed`."""
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(_filled(x_TI), weight_OI, None, "none", [], "")
    return y_TO[: len(x_TI)]


def has_packed(device: torch.device) -> bool:
    """Whether oneDNN's products are there for tensors of this device."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def has_vnni() -> bool:
    """Whether this machine multiplies 8-bit integers into 32-bit sums in one instruction."""
    return bool(torch.cpu._is_vnni_supported())


def kernels() -> dict[str, str | bool]:
    """What the products of this process run on: the instruction set, and the library of each precision."""
    one = torch.eye(8)
    libraries: dict[str, str | bool] = {
        p: type(linear(one, p)).__name__.removesuffix("Linear") for p in ("fp32", "int8")
    }
    return {"isa": torch.backends.cpu.get_cpu_capability(), "vnni": has_vnni(), **libraries}


def _filled(x_TI: Tensor) -> Tensor:
    more = padded_rows(len(x_TI)) - len(x_TI)
    return F.pad(x_TI, (0, 0, 0, more)) if more else x_TI
