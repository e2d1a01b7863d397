"""What distillation minimises. Heavy: torch.

Shape legend: B lists, N candidates (padded), L layers, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def yes_no_kl(student_BN: Tensor, teacher_BN: Tensor, real_BN: Tensor) -> Tensor:
    """Mean cross-entropy of the student's yes/no against the teacher's soft yes/no (KL plus a constant)."""
    loss = F.binary_cross_entropy_with_logits(student_BN, teacher_BN.sigmoid(), reduction="none")
    return loss[real_BN].mean()


def listwise_kl(student_BN: Tensor, teacher_BN: Tensor, real_BN: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the softmax over each list. Source: ListNet; arXiv 2405.07920 for distillation."""
    padded = ~real_BN
    target = (teacher_BN / temperature).masked_fill(padded, -torch.inf).softmax(-1)
    log_p = (student_BN / temperature).masked_fill(padded, -torch.inf).log_softmax(-1)
    per_row = torch.where(real_BN, target * (target.clamp(min=1e-12).log() - log_p.masked_fill(padded, 0)), 0.0)
    return temperature**2 * per_row.sum(-1).mean()


def lambda_loss(score_BN: Tensor, label_BN: Tensor, real_BN: Tensor) -> Tensor:
    """Pairwise logistic loss, each pair weighted by the NDCG that swapping it would change.

    Source: LambdaRank (Burges, MSR-TR-2010-82) with the loss of LambdaLoss (Wang et al., CIKM 2018).
    """
    order = score_BN.detach().masked_fill(~real_BN, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank_BN = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order))
    discount = 1 / torch.log2(rank_BN + 2.0)
    gain = label_BN * real_BN
    ideal = gain.sort(-1, descending=True).values @ (1 / torch.log2(torch.arange(gain.shape[-1]) + 2.0))
    better = (gain[:, :, None] > gain[:, None, :]) & real_BN[:, :, None] & real_BN[:, None, :]
    weight = (gain[:, :, None] - gain[:, None, :]) * (discount[:, :, None] - discount[:, None, :]).abs() * better
    loss = weight * F.softplus(score_BN[:, None, :] - score_BN[:, :, None])
    return (loss.sum((1, 2)) / ideal.clamp(min=1e-6)).mean()


def expert_shares(router_logits_L: Sequence[Tensor], real_T: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Share of real tokens' choices [L, E] that each expert gets, and its mean router probability [L, E]."""
    shares, means = [], []
    for logits_TE in router_logits_L:
        p_TE = logits_TE[real_T].float().softmax(-1)
        chosen = F.one_hot(p_TE.topk(top_k, dim=-1).indices, p_TE.shape[-1]).sum(1).float()
        shares.append(chosen.mean(0) / top_k)
        means.append(p_TE.mean(0))
    return torch.stack(shares), torch.stack(means)


def router_balance(shares_LE: Tensor, means_LE: Tensor) -> Tensor:
    """Switch's load-balancing loss: 1 when all experts of a layer are used alike. Source: arXiv 2101.03961, eq. 4."""
    return (shares_LE.shape[-1] * (shares_LE * means_LE).sum(-1)).mean()
