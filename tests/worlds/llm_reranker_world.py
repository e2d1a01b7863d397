"""A seeded latent world for reranker tests: shoppers like categories, titles name them, the ranker is half blind.

The ranker's score knows an item's quality but not the shopper's taste; the taste is in the text of the history. So a
reranker that reads can do better than the ranker, and one that does not read cannot.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_reranker.base import HistoryItem
from llm_reranker.config import DistillConfig
from llm_reranker.distill import distill
from llm_reranker.lists import SCHEMA
from llm_reranker.prompt import history_text, item_text
from recsys.core.ids import keys
from recsys.core.items import ItemTable
from recsys.core.run_dir import RunDirectory, RunWriter

TINY = DistillConfig(
    hidden_size=32, num_layers=1, num_experts=4, expert_width=32, teacher_hidden_size=64, teacher_layers=1,
    teacher_expert_width=64, vocab_size=600, prefix_tokens_max=64, item_tokens_max=12, depth=16, learning_rate=3e-3,
    student_epochs=2, student_steps_min=400,
)  # fmt: skip
KINDS = ("tea", "lamp", "shoe", "phone", "围巾", "耳机", "rice", "clock")
ADJECTIVES = ("red", "small", "antique", "new", "quiet", "大号", "cosy", "light")
DAY_US = 86_400_000_000


def items() -> ItemTable:
    rng = np.random.default_rng(0)
    ids = [f"item-{i}" for i in range(160)]
    table = pa.table(
        {
            "item_id": ids,
            "item_key": keys(ids),
            "title": [
                f"{ADJECTIVES[rng.integers(8)]} {KINDS[i % 8]} {ADJECTIVES[rng.integers(8)]}" for i in range(160)
            ],
            "category": [KINDS[i % 8] for i in range(160)],
        }
    )
    return ItemTable.from_table(table)


def write_lists(path: Path, *, queries: int = 300, candidates: int = 16, taste: float = 3.0, seed: int = 1) -> Path:
    """taste: how much the label depends on what the ranker cannot see; 0 = the ranker knows all there is.

    Every third list is of task new-only.
    """
    rng = np.random.default_rng(seed)
    table = items()
    texts = [item_text(t, c) for t, c in zip(table.column("title"), table.column("category"), strict=True)]
    kinds = np.array([KINDS.index(c) for c in table.column("category")])
    vectors = rng.normal(size=(8, 8))[kinds] + 0.3 * rng.normal(size=(160, 8))
    ids, columns = table.column("item_id"), {name: [] for name in SCHEMA.names}
    for q in range(queries):
        block = q * 4 // queries
        rotation = np.linalg.qr(np.random.default_rng(block).normal(size=(8, 8)))[0]
        at_us = (100 + 10 * block) * DAY_US
        liked = rng.integers(8)
        past = rng.choice(np.flatnonzero(kinds == liked), 4, replace=False)
        history = [
            HistoryItem(item_id=ids[i], text=texts[i], event_type=5, event_time_us=at_us - int(n + 1) * DAY_US)
            for n, i in reversed(list(enumerate(past)))
        ]
        shown = rng.choice(160, candidates, replace=False)
        rank = rng.normal(size=candidates) - 1
        p = 1 / (1 + np.exp(-(rank + taste * (kinds[shown] == liked) - taste / 3)))
        label = rng.random(candidates) < p
        columns["query_id"] += [f"q{q}"] * candidates
        columns["query_time"] += [at_us] * candidates
        columns["new_only"] += [q % 3 == 2] * candidates
        columns["history_text"] += [history_text(history, at_us)] * candidates
        columns["item_id"] += [ids[i] for i in shown]
        columns["item_text"] += [texts[i] for i in shown]
        columns["item_embedding"] += list((vectors[shown] @ rotation).astype(np.float32))
        columns["retrieval_score"] += list(rng.normal(size=candidates))
        columns["rank_score"] += list(rank)
        columns["origin"] += ["ann"] * candidates
        columns["label"] += list(label.astype(np.float32))
    pq.write_table(pa.table(columns, schema=SCHEMA), path)
    return path


@functools.cache
def distilled_run() -> RunDirectory:
    """A run with a tiny distilled reranker, made once per test process."""
    root = Path(tempfile.mkdtemp(prefix="double11-llm-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    fields = {
        "run_id": "test", "parent": None, "dataset_hash": "", "until": 200 * DAY_US, "seed": 0, "config": {},
        "versions": {}, "commit": "", "feature_views": "", "measures": {},
    }  # fmt: skip
    with RunWriter(root / "run", fields) as run:
        items().write(run.path("items.parquet"))
    lists = write_lists(root / "lists.parquet")
    distill(lists, items(), root / "folder", config=TINY, version="1")
    return RunDirectory.open(root / "run").add_files(root / "folder", "reranker/1", {"rerankers": ["1"]})


@pytest.fixture(name="world", scope="session")
def world_fixture() -> ModuleType:
    """The module of this fixture."""
    return sys.modules[__name__]


@pytest.fixture(name="run", scope="session")
def run_fixture() -> RunDirectory:
    """A run with a tiny distilled reranker."""
    return distilled_run()
