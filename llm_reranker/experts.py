"""The feed-forward part of a layer: one SwiGLU, or a mixture of them with tokens sorted by expert. Heavy: torch.

Shape legend: T tokens, D hidden, E experts, K experts per token, W expert width, A = T x K assignments, X rows sorted
by expert, each part filled up to `padded_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_reranker.linear import Linear, padded_rows


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
        self._router_ED, self._experts, self._per_token, self._normed = router_ED, experts, per_token, normed

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        weight_TK, expert_TK = route(x_TD, self._router_ED, self._per_token, normed=self._normed)
        row_X, place_TK, ends = _sorted_rows(expert_TK, len(self._experts))
        # Inputs are made once per token, not once per assignment: what is gathered of an int8 model is 8 bits wide.
        x, start = self._experts[0].gate_up.inputs(x_TD), 0
        y_XD = x_TD.new_empty(len(row_X), x_TD.shape[1])
        for expert, stop in zip(self._experts, ends, strict=True):
            if stop > start:  # one expert after another, so that what it makes stays in the processor's cache
                hidden_XW = gated(expert.gate_up.product(x.rows(row_X[start:stop])))
                y_XD[start:stop] = expert.down.product(expert.down.inputs(hidden_XW))
            start = stop
        return F.embedding_bag(place_TK, y_XD, per_sample_weights=weight_TK, mode="sum")


class GroupedMixture:
    """The same with all experts in one grouped product each way: on CUDA, in bfloat16."""

    def __init__(
        self, router_ED: Tensor, gate_up_EXD: Tensor, down_EDW: Tensor, *, per_token: int, normed: bool
    ) -> None:
        """gate_up_EXD: [E, 2W, D]. down_EDW: [E, D, W]."""
        self._router_ED, self._per_token, self._normed = router_ED, per_token, normed
        self._gate_up, self._down = gate_up_EXD.transpose(1, 2), down_EDW.transpose(1, 2)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        weight_TK, expert_TK = route(x_TD, self._router_ED, self._per_token, normed=self._normed)
        expert_A = expert_TK.flatten()
        order_A = expert_A.argsort(stable=True)
        ends_E = torch.bincount(expert_A, minlength=len(self._gate_up)).cumsum(0).to(torch.int32)
        x_AD = x_TD[order_A // self._per_token]
        hidden_AW = gated(torch._grouped_mm(x_AD, self._gate_up, ends_E))
        y_AD = torch.empty_like(x_AD)
        y_AD[order_A] = torch._grouped_mm(hidden_AW, self._down, ends_E)
        return (y_AD.view(*expert_TK.shape, -1) * weight_TK[..., None].to(y_AD.dtype)).sum(1)


def route(x_TD: Tensor, router_ED: Tensor, per_token: int, *, normed: bool) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and experts [T, K]: softmax over all experts in float32, of which the best K."""
    logit_TE = F.linear(x_TD, router_ED).float()
    best_TK, expert_TK = logit_TE.topk(per_token, dim=-1)
    weight_TK = (best_TK - best_TK[:, :1]).exp_()
    total_T1 = weight_TK if normed else (logit_TE - best_TK[:, :1]).exp_()
    return weight_TK / total_T1.sum(-1, keepdim=True), expert_TK


def gated(gate_up_TX: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2W]."""
    gate_TW, up_TW = gate_up_TX.chunk(2, dim=-1)
    return F.silu(gate_TW).mul_(up_TW)


def _sorted_rows(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Token of each row [X] (0 where filled up), place in X of each assignment [T, K], and where each expert ends."""
    expert_A = expert_TK.numpy().ravel()
    # Of 16 bits or fewer NumPy sorts by radix.
    order_A = np.argsort(expert_A.astype(np.uint16 if num_experts > 256 else np.uint8), kind="stable")
    counts_E = np.bincount(expert_A, minlength=num_experts)
    padded_E = np.array([padded_rows(n) for n in counts_E.tolist()])
    ends_E = padded_E.cumsum()
    row_X = np.zeros(ends_E[-1], np.int64)
    sorted_A = np.arange(len(expert_A)) + np.repeat(ends_E - padded_E - (counts_E.cumsum() - counts_E), counts_E)
    row_X[sorted_A] = order_A // expert_TK.shape[1]
    place_A = np.empty(len(expert_A), np.int64)
    place_A[order_A] = sorted_A
    return torch.from_numpy(row_X), torch.from_numpy(place_A).view(expert_TK.shape), ends_E.tolist()
