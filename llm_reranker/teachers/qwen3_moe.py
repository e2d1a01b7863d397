"""A larger Qwen3-MoE of ours, trained on the same lists as the student will be. Heavy: torch, transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_reranker import fit
from llm_reranker.config import DistillConfig
from llm_reranker.encoded import Encoded
from llm_reranker.lists import Lists
from llm_reranker.trainable import TrainableReranker

NAME = "qwen3-moe"


class Qwen3MoeTeacher:
    """Fitted to the labels of the training lists."""

    def __init__(
        self, model: TrainableReranker, data: Encoded, config: DistillConfig, facts: Mapping[str, Any]
    ) -> None:
        self._model, self._data, self._config, self._facts = model, data, config, facts

    @classmethod
    def train(
        cls, model: TrainableReranker, data: Encoded, chosen: Sequence[fit.Chosen], config: DistillConfig, seed: int
    ) -> Qwen3MoeTeacher:
        """Train a fresh network on the chosen lists."""
        loss = fit.train(model, data, chosen, config, epochs=config.teacher_epochs, seed=seed, what="teacher")
        return cls(model, data, config, {"name": NAME, "loss": round(loss, 4)})

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name and training loss."""
        return self._facts

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> list[npt.NDArray[np.float32]]:
        """Log-odds of "yes" for the given rows of each query, one float32 [n] per query."""
        assert lists is self._data.lists, "this teacher reads the lists it was trained beside"
        chosen = [fit.Chosen(q, r) for q, r in zip(queries, rows, strict=True)]
        return fit.predict(self._model, self._data, chosen, self._config.batch_lists)
