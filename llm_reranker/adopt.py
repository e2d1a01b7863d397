"""Takes a Qwen3 folder as the reranker, as it is: text mode, its weights in the final order fitted like a student's.

Qwen3-Reranker, Qwen3 or Qwen3-MoE in Hugging Face layout, sharded or not. Heavy: torch.
Shape legend: N candidates.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_reranker import checkpoint, quality
from llm_reranker.base import HistoryItem, RerankRequest
from llm_reranker.checkpoint import Card
from llm_reranker.config import DistillConfig, RerankConfig
from llm_reranker.engine import Engine
from llm_reranker.lists import read
from llm_reranker.splits import TASKS, held, split
from llm_reranker.teachers.local import LocalTeacher
from recsys.core.errors import Double11Error
from recsys.core.items import ItemTable

FILES = (
    "config.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_AS_OF_US = 1_700_000_000_000_000
_KNOWN_ANSWER_ITEMS = 4


def adopt(
    source: Path,
    lists_path: Path,
    items: ItemTable,
    out: Path,
    *,
    seed: int = 0,
    config: DistillConfig | None = None,
    serving: RerankConfig | None = None,
    version: str = "1",
    until_us: int | None = None,
) -> dict[str, Any]:
    """Copy the folder, judge it on the lists' last block, and write its card; returns the report.

    config: how many lists judge, and how deep. serving: how many tokens of history and item it reads, and in which
    precision it is judged and gives its known answer. until_us: see lists.read.
    Raises: NotFound, CorruptData for the folder; BadInput for lists that cannot be split.
    """
    config, serving = config or DistillConfig(), serving or RerankConfig()
    started_s = time.perf_counter()
    teacher = LocalTeacher(source, serving)
    lists = read(lists_path, until_us=until_us)
    parts = split(lists, config, seed)
    tasks: dict[str, Any] = {}
    for task in TASKS:
        of = held(lists, parts.validation[task], config.depth)
        said = teacher.label(lists, [c.query for c in of.chosen], [c.rows for c in of.chosen])
        raw = [judged.log_odds for _, judged in said]
        weight = of.weight(raw, seed)
        orders = {"rank": of.rank, "reranker": raw, "blended": of.blended(raw, weight)}
        ndcg = {name: quality.mean_ndcg(scores, of.label) for name, scores in orders.items()}
        tasks[task] = {"queries": len(of.chosen), "ndcg@10": ndcg, "weight": weight}
    report = {
        "checkpoint": source.resolve().name,
        "precision": serving.precision,
        "tasks": tasks,
        "active_parameters": {"student": teacher.facts["active_parameters"]},
        "seed": seed,
    }
    out.mkdir(parents=True)
    for path in [*(source / name for name in FILES), *checkpoint.weight_files(source)]:
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    Card(
        version=version,
        feature_names=(),
        soft_tokens=0,
        embedding_dim=0,
        prefix_tokens_max=serving.prefix_tokens_max,
        item_tokens_max=serving.item_tokens_max,
        calibration_scale=1.0,
        calibration_bias=0.0,
        blend_weight=tasks["all"]["weight"],
        blend_weight_new_only=tasks["new-only"]["weight"],
        known_answer=_known_answer(out, items, serving),
        report=report,
    ).write(out / "double11.json")
    return {**report, "version": version, "seconds": {"total": round(time.perf_counter() - started_s, 1)}}


def _known_answer(folder: Path, items: ItemTable, serving: RerankConfig) -> Mapping[str, Any]:
    """A request and the scores this machine gives it; others must give the same."""
    day_us, ids = 86_400_000_000, items.column("item_id")[:_KNOWN_ANSWER_ITEMS]
    history = [
        HistoryItem(item_id="", text=f"item {i}", event_type=5, event_time_us=_AS_OF_US - i * day_us) for i in (3, 2, 1)
    ]
    request = RerankRequest(
        request_id="known-answer",
        as_of_us=_AS_OF_US,
        history=history,
        item_ids=[*ids, "\u0000unknown"],
        texts=[*[""] * len(ids), "an item of no shop"],
        features=np.empty((len(ids) + 1, 0), np.float32),
    )
    loaded = checkpoint.read(folder, precision=serving.precision, device=serving.device)
    engine = Engine(loaded, items, serving, version="known-answer")
    answer = engine.score([request], [0.0])[0]
    if isinstance(answer, Double11Error):
        raise answer
    return {
        "as_of_us": request.as_of_us,
        "history": [dataclasses.asdict(h) for h in history],
        "item_ids": list(request.item_ids),
        "texts": list(request.texts),
        "features": [[] for _ in request.texts],
        "scores": answer.scores.tolist(),
    }
