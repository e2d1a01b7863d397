"""[heavy] One training step of an item table: TorchRec with the optimizer in the backward pass against plain torch.

peer: torch.nn.EmbeddingBag with sparse gradients and Adagrad, the same batches, dimension and pooling. limit: the rows
of the batch gathered and written back, the memory traffic no update can do without.

Shape legend: B samples, L ids per sample, D dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torchrec import KeyedJaggedTensor

from recsys.bench.harness import Contest, Row, measure
from recsys.models.embeddings import bag_tables, fuse_optimizer

_DIM, _IDS, _LEARNING_RATE = 64, 20, 0.05


def bench(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Samples per second: look-up, pooling, backward, update."""
    rows_max, batch, steps, repeats = (1_000, 64, 2, 2) if quick else (200_000, 2_048, 10, 7)
    torch.manual_seed(0)
    ids = (torch.rand(steps, batch * _IDS) ** 3 * rows_max).long()  # popular rows come up more often
    lengths_B, offsets_B = torch.full((batch,), _IDS), torch.arange(0, batch * _IDS, _IDS)
    jagged = [KeyedJaggedTensor(keys=["f"], values=step, lengths=lengths_B) for step in ids]

    tables = bag_tables({"item": rows_max}, _DIM, {"item": ["f"]})
    fuse_optimizer(tables, _LEARNING_RATE)

    def torchrec_steps() -> float:
        for features in jagged:
            tables(features).values().square().mean().backward()
        return steps * batch

    plain = torch.nn.EmbeddingBag(rows_max, _DIM, mode="mean", sparse=True)
    adagrad = torch.optim.Adagrad(plain.parameters(), lr=_LEARNING_RATE)

    def plain_steps() -> float:
        for step in ids:
            adagrad.zero_grad()
            plain(step, offsets_B).square().mean().backward()
            adagrad.step()
        return steps * batch

    weight = torch.randn(rows_max, _DIM)

    def move_rows() -> float:
        for step in ids:
            unique = step.unique()
            weight[unique] = weight[unique]
        return steps * batch

    contest = Contest(
        what="embedding bag training steps",
        unit="per_s",
        ours=("torchrec, row-wise Adagrad in backward", torchrec_steps),
        peer=("torch EmbeddingBag, sparse Adagrad", plain_steps),
        limit=("rows read and written once", move_rows),
    )
    config = {"rows": rows_max, "dim": _DIM, "batch": batch, "ids": _IDS, "steps": steps, "repeats": repeats}
    return {**config, "threads": torch.get_num_threads()}, measure([contest], repeats=repeats)
