"""The feed-forward part of a layer: one SwiGLU, or a mixture of them with tokens sorted by expert. Heavy: torch.

Shape legend: T tokens, D hidden, E experts, K experts per token, W expert width, A = T x K assignments, X rows sorted
by expert, each part filled up to `padded_rows`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_reranker.linear import Linear, linear, padded_rows
from llm_reranker.loops import best_experts, sorted_by_expert


class SwiGLU:
    """down(silu(gate x) * up x)."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        """gate_up: both in one product, [2W, D]."""
        self.gate_up, self.down = gate_up, down

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.down(gated(self.gate_up(x_TD)))


class Mixture:
    """Each token's best experts, weighted. One product per expert and projection, whoever asked."""

    def __init__(self, router_ED: Tensor, experts: Sequence[SwiGLU], *, per_token: int, normed: bool) -> None:
        self._router = linear(router_ED, "fp32")  # packed: a few columns take F.linear twice as long
        self._experts, self._per_token, self._normed = experts, per_token, normed

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        weight_TK, row_X, place_TK, ends = self._routed(self._router(x_TD))
        # Inputs are made once per token, not once per assignment: what is gathered of an int8 model is 8 bits wide.
        x, start = self._experts[0].gate_up.inputs(x_TD), 0
        y_XD = x_TD.new_empty(len(row_X), x_TD.shape[1])
        for expert, stop in zip(self._experts, ends, strict=True):
            if stop > start:  # one expert after another, so that what it makes stays in the processor's cache
                hidden_XW = gated(expert.gate_up.product(x.rows(row_X[start:stop])))
                y_XD[start:stop] = expert.down.product(expert.down.inputs(hidden_XW))
            start = stop
        return F.embedding_bag(place_TK, y_XD, per_sample_weights=weight_TK, mode="sum")

    def _routed(self, logit_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Weights [T, K], token of each row [X], each assignment's place in X [T, K], and where each expert ends."""
        weight_TK, expert_TK, count_E = best_experts(logit_TE.numpy(), self._per_token, self._normed)
        ends = list(itertools.accumulate(map(padded_rows, count_E.tolist())))
        row_X, place_TK = sorted_by_expert(expert_TK, np.array([0, *ends[:-1]]), ends[-1])
        return torch.from_numpy(weight_TK), torch.from_numpy(row_X), torch.from_numpy(place_TK), ends


class GroupedMixture:
    """The same with all experts in one grouped product each way: on CUDA, in bfloat16."""

    def __init__(
        self, router_ED: Tensor, gate_up_EXD: Tensor, down_EDW: Tensor, *, per_token: int, normed: bool
    ) -> None:
        """gate_up_EXD: [E, 2W, D]. down_EDW: [E, D, W]."""
        self._router_ED, self._per_token, self._normed = router_ED, per_token, normed
        self._gate_up, self._down = gate_up_EXD.transpose(1, 2), down_EDW.transpose(1, 2)
        self._expert_E = torch.arange(len(router_ED), device=router_ED.device)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        logit_TE = F.linear(x_TD, self._router_ED).float()
        best_TK, expert_TK = logit_TE.topk(self._per_token, dim=-1)
        weight_TK = best_TK.softmax(-1) if self._normed else (best_TK - logit_TE.logsumexp(-1, keepdim=True)).exp_()
        expert_A = expert_TK.flatten()
        order_A = expert_A.argsort(stable=True)
        # Sought, not counted: a count waits for the device, and a recorded forward must not.
        ends_E = torch.searchsorted(expert_A[order_A], self._expert_E, right=True, out_int32=True)
        x_AD = x_TD[order_A // self._per_token]
        hidden_AW = gated(torch._grouped_mm(x_AD, self._gate_up, ends_E))
        y_AD = torch.empty_like(x_AD)
        y_AD[order_A] = torch._grouped_mm(hidden_AW, self._down, ends_E)
        return (y_AD.view(*expert_TK.shape, -1) * weight_TK[..., None].to(y_AD.dtype)).sum(1)


def gated(gate_up_TX: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2W]."""
    gate_TW, up_TW = gate_up_TX.chunk(2, dim=-1)
    return F.silu(gate_TW).mul_(up_TW)
