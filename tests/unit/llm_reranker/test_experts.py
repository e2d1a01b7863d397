"""Both mixtures against one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_reranker.experts import GroupedMixture, Mixture, SwiGLU
from llm_reranker.linear import linear

D, W, E, K = 32, 16, 6, 2


def weights() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=g) * 0.3 for s in ((E, D), (E, 2 * W, D), (E, D, W)))  # type: ignore[return-value]


def one_by_one(x_TD: Tensor, *, normed: bool) -> Tensor:
    router, gate_up, down = weights()
    out = []
    for x in x_TD:
        probability = (router @ x).softmax(-1)
        best = probability.topk(K)
        share = best.values / best.values.sum() if normed else best.values
        parts = [gate_up[e] @ x for e in best.indices]
        out.append(
            sum(s * (down[e] @ (F.silu(p[:W]) * p[W:])) for s, e, p in zip(share, best.indices, parts, strict=True))
        )
    return torch.stack(out)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_mixtures_compute_each_token_with_its_own_experts(tokens: int, normed: bool) -> None:
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
    router, gate_up, down = weights()
    experts = [SwiGLU(linear(a, "fp32"), linear(b, "fp32")) for a, b in zip(gate_up, down, strict=True)]
    expected = one_by_one(x, normed=normed)
    assert torch.allclose(Mixture(router, experts, per_token=K, normed=normed)(x), expected, atol=1e-4)
    assert torch.allclose(GroupedMixture(router, gate_up, down, per_token=K, normed=normed)(x), expected, atol=1e-4)
