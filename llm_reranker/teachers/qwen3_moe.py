"""A larger Qwen3-MoE of ours, trained on the same lists as the student will be. Heavy: torch, transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_reranker import fit
from llm_reranker.config import DistillConfig
from llm_reranker.encoded import Encoded
from llm_reranker.lists import Lists
from llm_reranker.teachers.base import Judgement
from llm_reranker.trainable import TrainableReranker

NAME = "qwen3-moe"


class Qwen3MoeTeacher:
    """Fitted to the labels of the training lists, at the first question."""

    fitted = True

    def __init__(
        self,
        network: Callable[[], TrainableReranker],
        data: Encoded,
        chosen: Sequence[fit.Chosen],
        config: DistillConfig,
        *,
        seed: int,
        fingerprint: str,
        active_parameters: int,
    ) -> None:
        """network: makes the fresh network. fingerprint: of all that decides its labels."""
        self._network, self._data, self._chosen, self._config, self._seed = network, data, chosen, config, seed
        self._model: TrainableReranker | None = None
        self._facts: dict[str, Any] = {"name": NAME, "active_parameters": active_parameters}
        self.name = f"{NAME}:{fingerprint}"

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name, active parameters and training loss, which is missing where every label was kept from before."""
        return self._facts

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[int, Judgement]]:
        """Log-odds of "yes" for the given rows of each query."""
        assert lists is self._data.lists, "this teacher reads the lists it was trained beside"
        if self._model is None:
            self._model, c = self._network(), self._config
            loss = fit.train(
                self._model, self._data, self._chosen, c, epochs=c.teacher_epochs, seed=self._seed, what="teacher"
            )
            self._facts["loss"] = round(loss, 4)
        chosen = [fit.Chosen(q, r) for q, r in zip(queries, rows, strict=True)]
        for at, scores in enumerate(fit.predict(self._model, self._data, chosen, self._config.batch_lists)):
            yield at, Judgement(log_odds=scores)
