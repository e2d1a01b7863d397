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
    """One list of the training set: its query, the rows that are trained on and, for a student, their labels."""

    query: int
    rows: Rows
    teacher: Scores | None = None


def features_of(data: Encoded, query: int, rows: Rows) -> npt.NDArray[np.float32]:
    """Features of some rows of a list, their rank_position counted in the whole list. float32 [n, F]."""
    whole = data.lists.rows(query)
    at = {int(r): i for i, r in enumerate(whole)}
    return data.lists.features(whole)[[at[int(r)] for r in rows]]


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
    """Share of the tokens' choices that each expert gets, [L][E]."""
    with torch.inference_mode():
        _, router_logits, real = model(_tensors(data, chosen))
        shares, _ = losses.expert_shares(router_logits, real, model.lm.config.num_experts_per_tok)
    return [[round(float(x), 4) for x in layer] for layer in shares]


def _loss(model: TrainableReranker, batch: Batch, teacher: Tensor | None, config: DistillConfig) -> Tensor:
    score, router_logits, real_token = model(batch)
    real = batch.real_BN
    loss = losses.lambda_loss(score, batch.label_BN, real)
    if teacher is None:
        loss = loss + losses.yes_no_kl(score, torch.logit(batch.label_BN, eps=1e-6), real)
    else:
        loss = loss + losses.yes_no_kl(score, teacher, real)
        loss = loss + losses.listwise_kl(score, teacher, real, config.temperature)
    shares, means = losses.expert_shares(router_logits, real_token, model.lm.config.num_experts_per_tok)
    return loss + config.router_balance * losses.router_balance(shares, means)


def _tensors(data: Encoded, part: Sequence[Chosen]) -> Batch:
    return data.batch(
        [c.query for c in part], [c.rows for c in part], [features_of(data, c.query, c.rows) for c in part]
    )


def _teacher(part: Sequence[Chosen], batch: Batch) -> Tensor | None:
    labels = [c.teacher for c in part]
    if any(t is None for t in labels):
        return None
    padded = torch.zeros_like(batch.label_BN)
    for b, values in enumerate(labels):
        assert values is not None
        padded[b, : len(values)] = torch.from_numpy(values)
    return padded


def _batches(n: int, size: int, rng: np.random.Generator) -> list[list[int]]:
    order = rng.permutation(n).tolist()
    return [order[i : i + size] for i in range(0, n, size)]


def _warm_cosine(progress: float) -> float:
    if progress < _WARMUP_SHARE:
        return max(progress, 1e-3) / _WARMUP_SHARE
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))
