"""8-bit products against float32 ones, packed ones against plain ones, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_reranker.linear import (
    FbgemmInt8Linear,
    Linear,
    PackedInt8Linear,
    PackedLinear,
    PlainLinear,
    has_vnni,
    kernels,
    linear,
    padded_rows,
)

INT8: list[Callable[[Tensor], Linear]] = [FbgemmInt8Linear, *([PackedInt8Linear] if has_vnni() else [])]
FP32: list[Callable[[Tensor], Linear]] = [PlainLinear, PackedLinear]


@pytest.mark.parametrize("kind", INT8)
def test_int8_is_within_two_percent_for_quiet_and_loud_tokens_alike(kind: Callable[[Tensor], Linear]) -> None:
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(96, 64, generator=g) * 0.05, torch.randn(40, 64, generator=g)
    x[::2] *= 1e-4
    x[1::4] *= 1e3
    expected, found = F.linear(x, weight), kind(weight)(x)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() <= 0.02
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("kind", INT8)
def test_int8_of_nothing_is_nothing(kind: Callable[[Tensor], Linear]) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(4))
    weight[3] = 0
    product = kind(weight)
    assert torch.equal(product(torch.zeros(2, 16)), torch.zeros(2, 8))
    assert product(torch.ones(1, 16))[0, 3] == 0
    assert product(torch.empty(0, 16)).shape == (0, 8)


@pytest.mark.parametrize("kind", FP32)
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 33, 250])
def test_packing_changes_no_number(kind: Callable[[Tensor], Linear], rows: int) -> None:
    g = torch.Generator().manual_seed(5)
    weight, x = torch.randn(24, 40, generator=g), torch.randn(rows, 40, generator=g)
    assert torch.allclose(kind(weight)(x), F.linear(x, weight), atol=1e-4)


@pytest.mark.parametrize("kind", INT8 + FP32)
def test_rows_are_made_once_and_then_chosen(kind: Callable[[Tensor], Linear]) -> None:
    g = torch.Generator().manual_seed(6)
    product, x = kind(torch.randn(24, 40, generator=g)), torch.randn(20, 40, generator=g)
    chosen = product.inputs(x).rows(torch.arange(19, -1, -1))
    assert torch.allclose(product.product(chosen.part(4, 12)), product(x.flip(0))[4:12], atol=1e-5)


def test_rows_are_filled_to_few_sizes() -> None:
    sizes = {padded_rows(n) for n in range(8193)}
    assert len(sizes) <= 113
    assert all(n <= padded_rows(n) < n + max(8, n / 15) for n in range(8193))


def test_what_runs_is_said() -> None:
    assert set(kernels()) == {"isa", "vnni", "fp32", "int8"}
    assert isinstance(linear(torch.eye(8), "int8"), PackedInt8Linear if has_vnni() else FbgemmInt8Linear)
