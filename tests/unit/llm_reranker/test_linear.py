"""8-bit products against float32 ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm_reranker.linear import linear


def test_int8_is_within_two_percent_for_quiet_and_loud_tokens_alike() -> None:
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(96, 64, generator=g) * 0.05, torch.randn(40, 64, generator=g)
    x[::2] *= 1e-4
    x[1::4] *= 1e3
    expected, found = F.linear(x, weight), linear(weight, "int8")(x)
    assert torch.equal(linear(weight, "fp32")(x), expected)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() <= 0.02
    assert not torch.equal(found, expected)


def test_int8_of_nothing_is_nothing() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(4))
    weight[3] = 0
    product = linear(weight, "int8")
    assert torch.equal(product(torch.zeros(2, 16)), torch.zeros(2, 8))
    assert product(torch.ones(1, 16))[0, 3] == 0
    assert product(torch.empty(0, 16)).shape == (0, 8)
