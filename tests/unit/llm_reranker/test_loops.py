"""Compiled loops against the torch that says the same, and what becomes of numbers that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_reranker.loops import best_experts, quantized, sorted_by_expert
from llm_reranker.model import _turned


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_number_that_is_none_is_seen_and_is_alone_in_it(wrong: float) -> None:
    x = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    x[1, 17] = wrong
    values, scale = quantized(x)
    assert np.isfinite(scale[:, 0]).tolist() == [True, False, True]
    assert np.abs((values[::2] - 128.0) * scale[::2] - x[::2]).max() <= scale[::2].max() / 2 * 1.001


@pytest.mark.parametrize("heads", [3, 5])
def test_norm_and_turn_is_what_torch_makes_of_it(heads: int) -> None:
    g = torch.Generator().manual_seed(1)
    x, weight, angle = torch.randn(7, 5, 12, generator=g), torch.rand(12, generator=g), torch.randn(7, 6, generator=g)
    turn = torch.stack([angle.cos(), angle.sin()], 1)
    expected = _turned(x.double(), heads, weight, turn, 1e-6)
    assert torch.allclose(_turned(x.clone(), heads, weight, turn, 1e-6).double(), expected, atol=1e-5)


@pytest.mark.parametrize("normed", [True, False])
def test_best_experts_are_the_largest_of_a_softmax(normed: bool) -> None:
    logit = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) * 3
    weight, expert, count = best_experts(logit.numpy(), 3, normed)
    best = logit.softmax(-1).topk(3)
    assert torch.equal(torch.from_numpy(expert), best.indices)
    share = best.values / best.values.sum(-1, keepdim=True) if normed else best.values
    assert torch.allclose(torch.from_numpy(weight), share, atol=1e-6)
    assert count.tolist() == torch.bincount(best.indices.flatten(), minlength=6).tolist()


def test_a_router_that_says_nothing_leads_nowhere_else() -> None:
    weight, expert, count = best_experts(np.full((2, 4), np.nan, np.float32), 2, True)
    assert np.isnan(weight).all()
    assert ((expert >= 0) & (expert < 4)).all()
    assert count.sum() == 4


def test_rows_lie_by_expert_in_the_order_of_tokens() -> None:
    row, place = sorted_by_expert(np.array([[1, 0], [1, 2], [0, 1]]), np.array([0, 4, 8]), 12)
    assert row.tolist() == [0, 2, 0, 0, 0, 1, 2, 0, 1, 0, 0, 0]
    assert place.tolist() == [[4, 0], [5, 8], [1, 6]]
