"""The training loop that teacher and student share, and scoring with a trained network. Heavy: torch.

Shape legend: N candidates of a list, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_reranker import losses
from llm_reranker.config import DistillConfig
from llm_reranker.encoded import Batch, Encoded, Rows
from llm_reranker.trainable import TrainableReranker
from recsys.core.progress import track

Scores = npt.NDArray[np.float32]
_WARMUP_SHARE = 0.1
_CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.01
_EXTRAS_LR = 5.0  # few steps, small layers


@dataclass(frozen=True, slots=True)
class Chosen:
    """One list: its query, the rows that are scored and, for a student, their soft labels."""

    query: int
    rows: Rows
    teacher: Scores | None = None


def features_of(data: Encoded, one: Chosen) -> npt.NDArray[np.float32]:
    """Features of the chosen rows, their rank_position counted among all of the list. float32 [n, F]."""
    whole = data.lists.rows(one.query)
    at = {int(r): i for i, r in enumerate(whole)}
    return data.lists.features(whole)[[at[int(r)] for r in one.rows]]


def train(
    model: TrainableReranker, data: Encoded, chosen: Sequence[Chosen], config: DistillConfig, *, epochs: int, seed: int,
    what: str,
) -> float:  # fmt: skip
    """Train in place; the mean loss of the last epoch. Lists with teacher scores are distilled, others only fitted."""
    model.train()
    rng = np.random.default_rng(seed)
    steps = math.ceil(len(chosen) / config.batch_lists) * epochs
    groups = [
        {"params": list(model.lm.parameters()), "lr": config.learning_rate},
        {"params": list(model.extras.parameters()), "lr": config.learning_rate * _EXTRAS_LR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step / steps))
    batches = [order for _ in range(epochs) for order in _batches(len(chosen), config.batch_lists, rng)]
    total = 0.0
    for i, order in enumerate(track(batches, what=what, unit="step")):
        part = [chosen[j] for j in order]
        batch = _tensors(data, part)
        hidden = torch.from_numpy(rng.random(batch.label_BN.shape) < config.embedding_dropout)
        batch.embedding_BNC[hidden] = math.nan
        loss = _loss(model, batch, _teacher(part, batch), config)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        optimizer.step()
        schedule.step()
        if i >= len(batches) * (epochs - 1) // epochs:
            total += loss.item()
    model.eval()
    return total / max(1, len(batches) // epochs)


def predict(model: TrainableReranker, data: Encoded, chosen: Sequence[Chosen], batch_lists: int) -> list[Scores]:
    """Raw log-odds of every chosen row, one float32 [n] per list."""
    scores: list[Scores] = []
    with torch.inference_mode():
        for start in range(0, len(chosen), batch_lists):
            part = chosen[start : start + batch_lists]
            out, _, _ = model(_tensors(data, part))
            scores += [row[: len(c.rows)].numpy() for row, c in zip(out, part, strict=True)]
    return scores


def expert_usage(model: TrainableReranker, data: Encoded, chosen: Sequence[Chosen]) -> list[list[float]]:
    """Share of the tokens' choices that each expert gets, [L][E]; nothing for a dense network."""
    with torch.inference_mode():
        _, router_logits, real = model(_tensors(data, chosen))
        if not router_logits:
            return []
        shares, _ = losses.expert_shares(router_logits, real, model.lm.config.num_experts_per_tok)
    return [[round(float(x), 4) for x in layer] for layer in shares]


def _loss(model: TrainableReranker, batch: Batch, teacher_BN: Tensor, config: DistillConfig) -> Tensor:
    score, router_logits, real_token = model(batch)
    real = batch.real_BN
    soft = real & teacher_BN.isfinite()
    loss = losses.lambda_loss(score, batch.label_BN, real)
    target = torch.where(soft, teacher_BN, torch.logit(batch.label_BN, eps=1e-6))
    loss = loss + losses.yes_no_kl(score, target, real)
    if (taught := soft.any(-1)).any():
        known = torch.where(soft, teacher_BN, 0.0)
        loss = loss + losses.listwise_kl(score[taught], known[taught], soft[taught], config.temperature)
    if not router_logits:
        return loss
    shares, means = losses.expert_shares(router_logits, real_token, model.lm.config.num_experts_per_tok)
    return loss + config.router_balance * losses.router_balance(shares, means)


def _tensors(data: Encoded, part: Sequence[Chosen]) -> Batch:
    return data.batch([c.query for c in part], [c.rows for c in part], [features_of(data, c) for c in part])


def _teacher(part: Sequence[Chosen], batch: Batch) -> Tensor:
    """Soft labels [B, N] as log-odds; NaN where a list has none."""
    padded = torch.full_like(batch.label_BN, math.nan)
    for b, one in enumerate(part):
        if one.teacher is not None:
            padded[b, : len(one.teacher)] = torch.from_numpy(one.teacher)
    return padded


def _batches(n: int, size: int, rng: np.random.Generator) -> list[list[int]]:
    order = rng.permutation(n).tolist()
    return [order[i : i + size] for i in range(0, n, size)]


def _warm_cosine(progress: float) -> float:
    if progress < _WARMUP_SHARE:
        return max(progress, 1e-3) / _WARMUP_SHARE
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))
