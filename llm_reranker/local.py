"""A Reranker in this process, from a run or any Qwen3 folder, after it gave the known answer. Heavy: torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_reranker import checkpoint
from llm_reranker.base import HistoryItem, RerankRequest, RerankResult
from llm_reranker.batcher import Batcher
from llm_reranker.checkpoint import Checkpoint
from llm_reranker.config import RerankConfig
from llm_reranker.engine import Engine
from llm_reranker.speed import SpeedModel
from recsys.core.deadline import Deadline
from recsys.core.errors import CorruptData, Double11Error, NotFound
from recsys.core.items import ItemTable
from recsys.core.run_dir import RunDirectory

# Of the known answer, absolute and relative: what other instructions, and narrower numbers, may change.
KNOWN_ANSWER_TOLERANCE = {"fp32": 1e-3, "int8": 0.1, "bf16": 0.1}
_PROBE_CANDIDATES = 128


class LocalReranker:
    """A Reranker in this process: an Engine behind a Batcher and one thread."""

    def __init__(self, engine: Engine, config: RerankConfig) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rerank")
        self._batcher: Batcher[RerankRequest, RerankResult] = Batcher(
            engine.score, engine.affordable_tokens, self._executor, batch_tokens_max=config.batch_tokens_max,
            queue_requests_max=config.queue_requests_max,
        )  # fmt: skip

    @classmethod
    def load(
        cls, run: RunDirectory, version: str | None = None, *, config: RerankConfig | None = None
    ) -> LocalReranker:
        """The reranker of a run, its serving version unless another is named, after it gave the known answer.

        Raises: NotFound without (that) reranker; CorruptData for a damaged folder or a wrong known answer.
        """
        config = config or RerankConfig()
        version, loaded = read_version(run, version, config)
        return cls.of(loaded, ItemTable.read(run.path("items.parquet")), version, config)

    @classmethod
    def from_folder(cls, folder: Path, items: ItemTable, *, config: RerankConfig | None = None) -> LocalReranker:
        """A reranker from any Qwen3 folder (a Qwen3-Reranker checkpoint scores in text mode)."""
        config = config or RerankConfig()
        loaded = checkpoint.read(folder, precision=config.precision, device=config.device)
        return cls.of(loaded, items, folder.name, config)

    @classmethod
    def of(
        cls, loaded: Checkpoint, items: ItemTable, version: str, config: RerankConfig | None = None
    ) -> LocalReranker:
        """From a loaded checkpoint. Raises: CorruptData for a wrong known answer."""
        config = config or RerankConfig()
        engine = Engine(loaded, items, config, version=version)
        if loaded.card is not None:
            _probe(engine, loaded.card.known_answer, KNOWN_ANSWER_TOLERANCE[config.precision])
        return cls(engine, config)

    @property
    def version(self) -> str:
        """Version folder of the model."""
        return self._engine.version

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Candidate features the model wants; empty for a plain Hugging Face folder."""
        return self._engine.feature_names

    @property
    def blend_weight(self) -> float:
        """Weight of the reranker's score in the final order, chosen on validation."""
        return self._engine.blend_weight

    async def rerank(self, request: RerankRequest, deadline: Deadline) -> RerankResult:
        """Log-odds of "yes" for the first `depth` candidates that fit the deadline; see Reranker.

        Raises: BadInput, DeadlineExceeded, Overloaded.
        """
        self._engine.check(request)
        deadline.require("rerank")
        if not request.item_ids:
            return RerankResult(scores=np.empty(0, np.float32), depth=0, version=self.version)
        return await self._batcher.submit(request, self._engine.cost_tokens(request), deadline)

    def close(self) -> None:
        """Stop the thread after the batch in hand."""
        self._executor.shutdown(wait=True)

    async def stop(self) -> None:
        """The same, for a server that also serves rerankers whose end is awaited."""
        self.close()


def read_version(run: RunDirectory, version: str | None, config: RerankConfig) -> tuple[str, Checkpoint]:
    """A reranker version of a run, the serving one unless named. Raises: NotFound, CorruptData, VersionMismatch."""
    versions = run.reranker_versions()
    if not versions or (version is not None and version not in versions):
        raise NotFound(
            f"run {run.run_id}, reranker", came=version or "none", expected=f"one of {versions}",
            fix=f"Make one: double11 distill DIR --run {run.root}",
        )  # fmt: skip
    version = version or versions[-1]
    folder = f"reranker/{version}"
    has = lambda name: run.has(f"{folder}/{name}")  # noqa: E731 one line says it
    return version, checkpoint.read(run.root / folder, has=has, precision=config.precision, device=config.device)


def _probe(engine: Engine, known: Mapping[str, Any], tolerance: float) -> None:
    """Score the request stored at distillation, and measure this machine's speed with it."""
    few = RerankRequest(
        request_id="known-answer",
        as_of_us=known["as_of_us"],
        history=[HistoryItem(**h) for h in known["history"]],
        item_ids=known["item_ids"],
        texts=known["texts"],
        features=np.array(known["features"], np.float32).reshape(len(known["item_ids"]), -1),
    )
    result = engine.score([few], [0.0])[0]
    expected = np.array(known["scores"], np.float32)
    if isinstance(result, Double11Error):
        raise result
    if not np.allclose(result.scores, expected, rtol=tolerance, atol=tolerance):
        raise CorruptData(
            f"reranker {engine.version}, known answer",
            came=result.scores.tolist(),
            expected=f"{expected.tolist()} within {tolerance}",
            fix="Do not serve it: distil (or take the folder) with the [llm_reranker] precision that serves, "
            "or check the machine's libraries.",
        )
    rows = [i % len(few.item_ids) for i in range(_PROBE_CANDIDATES)]
    many = replace(
        few, item_ids=[few.item_ids[i] for i in rows], texts=[few.texts[i] for i in rows], features=few.features[rows]
    )
    small, large = (min(_timed(engine, r) for _ in range(3)) for r in (few, many))
    engine.forget_scores()
    engine.speed = SpeedModel.from_two(
        (len(few.item_ids) * engine.suffix_tokens, small), (_PROBE_CANDIDATES * engine.suffix_tokens, large)
    )


def _timed(engine: Engine, request: RerankRequest) -> float:
    engine.forget_scores()
    started_s = time.perf_counter()
    engine.score([request], [0.0])
    return (time.perf_counter() - started_s) * 1e3
