"""What both training loops share: seeds, threads, and the stop on a loss that is not a number or explodes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from recsys.core import CorruptData, disk

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

    def __init__(self, what: str, folder: Path, rank: int = 0) -> None:
        """what: "tower" or "ranker"; folder: where the offending batch is saved, by each rank its share."""
        self._what, self._folder, self._rank, self._first = what, folder, rank, math.inf

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
        share = f"-rank-{self._rank}" if self._rank else ""
        path = self._folder / f"{self._what}-bad-batch-{step}{share}.safetensors"
        with disk.writing(path):
            save_file({n: t.contiguous().clone() for n, t in batch.items()}, path)
        raise CorruptData(
            f"training the {self._what}, step {step}",
            came=f"a loss of {value}",
            expected=f"a finite one near or below the first, {self._first:.4g}",
            fix=f"Look at the batch saved in {path}; if its values are sound, lower the learning rate.",
        )


class Schedule:
    """Batches of examples, a new order each epoch. Its place can be saved and set, in the middle of an epoch too."""

    def __init__(self, rng: np.random.Generator, examples: npt.NDArray[np.int64], *, epochs: int, batch: int) -> None:
        """rng: shared with whoever draws between batches; examples: int64 [M]; batch: examples in one, about."""
        self._rng, self._examples = rng, examples
        self._per_epoch = -(-len(examples) // batch)
        self.steps, self.step = epochs * self._per_epoch, 0
        self._epoch_start = rng.bit_generator.state

    def __iter__(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """From the current place on: (step, from 0; rows of `examples`)."""
        while self.step < self.steps:
            place = self.step % self._per_epoch
            if place == 0:
                self._epoch_start = self._rng.bit_generator.state
            now = self._rng.bit_generator.state
            self._rng.bit_generator.state = self._epoch_start
            batches = np.array_split(self._rng.permutation(self._examples), self._per_epoch)
            if place:
                self._rng.bit_generator.state = now
            for batch in batches[place:]:
                self.step += 1
                yield self.step - 1, batch

    def place(self) -> dict[str, Any]:
        """Where it is, to be saved after the step that was yielded last. JSON."""
        return {"step": self.step, "epoch_start": self._epoch_start, "rng": self._rng.bit_generator.state}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Continue from what `place` gave."""
        self.step, self._epoch_start = place["step"], place["epoch_start"]
        self._rng.bit_generator.state = place["rng"]
