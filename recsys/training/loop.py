"""What both training loops share: seeds, threads, and the stop on a loss that is not a number or explodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from recsys.core import CorruptData

_EXPLODED_TIMES = 1e4


def seed_torch(seed: int, threads: int) -> None:
    """Seed torch (weights, dropout), fix its thread count, and refuse operations that do not repeat.

    Everything else draws from a generator that is handed in. Sums run in an order that depends on the thread count,
    so bitwise repetition asks for the same `threads`.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


class LossGuard:
    """Watches a loss and stops the training that produced nonsense, keeping the batch that did it."""

    def __init__(self, what: str, folder: Path) -> None:
        """what: "tower" or "ranker"; folder: where the offending batch is saved."""
        self._what, self._folder, self._first = what, folder, math.inf

    def check(self, loss: Tensor, step: int, batch: Mapping[str, Tensor]) -> float:
        """The loss as a number.

        Raises: CorruptData, after saving the batch as safetensors, when it is not finite or exceeds ten thousand
        times the first one.
        """
        value = float(loss.detach())
        self._first = max(value, 1e-3) if math.isinf(self._first) else self._first
        if math.isfinite(value) and value <= _EXPLODED_TIMES * self._first:
            return value
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._what}-bad-batch-{step}.safetensors"
        save_file({n: t.contiguous().clone() for n, t in batch.items()}, path)
        raise CorruptData(
            f"training the {self._what}, step {step}",
            came=f"a loss of {value}",
            expected=f"a finite one near or below the first, {self._first:.4g}",
            fix=f"Look at the batch saved in {path}; if its values are sound, lower the learning rate.",
        )
