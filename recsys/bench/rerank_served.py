"""[heavy] A rerank as it is served: the worker process, gRPC, soft tokens, one request after another.

Shape legend: N candidates, F features.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import kendalltau

from llm_reranker.base import HistoryItem, RerankRequest
from llm_reranker.client import RemoteReranker
from llm_reranker.config import DistillConfig
from llm_reranker.distill import distill
from llm_reranker.lists import SCHEMA
from llm_reranker.prompt import history_text, item_text
from recsys.bench.harness import Row, figure, sampled
from recsys.core import Deadline, Internal
from recsys.core.ids import keys
from recsys.core.items import ItemTable
from recsys.core.run_dir import RunDirectory, RunWriter

_CANDIDATES, _HISTORY, _ITEMS, _EMBEDDING = 100, 20, 2_000, 32
_AT_US, _HOUR_US = 1_700_000_000_000_000, 3_600_000_000
Scores = npt.NDArray[np.float32]
_WORDS = np.array(["red", "linen", "kettle", "lamp", "围巾", "耳机", "clock", "small", "mug", "tea", "brass", "garden"])


def served(folder: Path, run_path: Path | None, *, requests: int) -> list[Row]:
    """Milliseconds a request of 100 candidates takes its caller, by precision: users unknown to the cache, then known.

    run_path: the run whose reranker answers; None: the default student, hardly trained, which computes as much.
    """
    run = RunDirectory.open(run_path) if run_path else _student_run(folder)
    asked = _requests(run, requests)
    scores: dict[str, list[Scores]] = {}
    rows: list[Row] = []
    for precision in ("fp32", "int8"):
        with _worker(run, folder, precision) as target:
            for users in ("new", "known"):
                took_ms, scores[precision] = asyncio.run(_ask(target, asked))
                for q in (50, 99):
                    what = f"served, {_CANDIDATES} candidates of {users} users, {precision}, p{q}"
                    rows.append(sampled(what, "ms", {"ours": ("RerankService", [float(np.percentile(took_ms, q))])}))
    taus = [float(kendalltau(*pair).statistic) for pair in zip(scores["fp32"], scores["int8"], strict=True)]
    return [*rows, figure("served, order of int8 against fp32, mean", "tau", float(np.mean(taus)))]


async def _ask(target: str, requests: list[RerankRequest]) -> tuple[list[float], list[Scores]]:
    reranker = RemoteReranker(target)
    took_ms: list[float] = []
    scores: list[Scores] = []
    for request in requests:
        started_s = time.perf_counter()
        result = await reranker.rerank(request, Deadline.after_ms(60_000))
        took_ms.append((time.perf_counter() - started_s) * 1e3)
        if result.depth != len(request.item_ids):
            raise Internal("served rerank", came=result.depth, expected=f"depth {_CANDIDATES}", fix="Report it.")
        scores.append(result.scores)
    await reranker.close()
    return took_ms, scores


@contextmanager
def _worker(run: RunDirectory, folder: Path, precision: str) -> Iterator[str]:
    """A rerank worker with an empty prefix cache; score cache and adaptive depth off."""
    config = folder / f"{precision}.toml"
    options = {
        "precision": f'"{precision}"',
        "deadline_ms_max": 60_000.0,
        "score_cache_items_max": 0,
        "adaptive_depth": "false",
    }
    config.write_text("\n".join(["[llm_reranker]", *(f"{name} = {value}" for name, value in options.items())]))
    argv = [sys.executable, "-m", "llm_reranker.server", "--run", str(run.root), "--config", str(config)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready = json.loads((process.stdout.readline() if process.stdout else "") or "{}")
            if not ready.get("ready"):
                raise Internal("rerank worker", came=ready, expected="a ready line", fix="See its log above.")
            yield f"127.0.0.1:{ready['port']}"
        finally:
            process.terminate()


def _requests(run: RunDirectory, count: int) -> list[RerankRequest]:
    """Each of another user with a history of his own."""
    items = ItemTable.read(run.path("items.parquet"))
    ids, rng = items.column("item_id"), np.random.default_rng(0)
    version = run.reranker_versions()[-1]
    names = json.loads(run.path(f"reranker/{version}/double11.json").read_text("utf-8"))["feature_names"]
    found = []
    for i in range(count):
        past, shown = rng.integers(0, len(ids), _HISTORY), rng.integers(0, len(ids), _CANDIDATES)
        history = [
            HistoryItem(item_id=ids[row], text="", event_type=3, event_time_us=_AT_US - (_HISTORY - h) * _HOUR_US)
            for h, row in enumerate(past)
        ]
        features = rng.normal(size=(_CANDIDATES, len(names))).astype(np.float32)
        found.append(
            RerankRequest(
                request_id=f"r{i}",
                as_of_us=_AT_US,
                history=history,
                item_ids=[ids[row] for row in shown],
                texts=[""] * _CANDIDATES,
                features=features,
            )
        )
    return found


def _student_run(folder: Path) -> RunDirectory:
    """A run with the default student of `distill`, trained for a few steps on made-up lists."""
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(_WORDS, 6)) for _ in range(_ITEMS)]
    ids = [f"item-{i}" for i in range(_ITEMS)]
    items = ItemTable.from_table(pa.table({"item_id": ids, "item_key": keys(ids), "title": titles}))
    fields: dict[str, object] = {
        "run_id": "bench", "parent": None, "dataset_hash": "", "until": _AT_US, "seed": 0, "config": {},
        "versions": {}, "commit": "", "feature_views": "", "measures": {},
    }  # fmt: skip
    with RunWriter(folder / "run", fields) as run:
        items.write(run.path("items.parquet"))
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for q in range(24):
        at_us, shown = _AT_US + (q // 12) * _HOUR_US, rng.permutation(_ITEMS)[:40]
        past = [
            HistoryItem(item_id="", text=titles[i], event_type=3, event_time_us=at_us - _HOUR_US) for i in shown[:5]
        ]
        columns["query_id"] += [f"q{q}"] * len(shown)
        columns["query_time"] += [at_us] * len(shown)
        columns["new_only"] += [q % 3 == 0] * len(shown)
        columns["history_text"] += [history_text(past, at_us)] * len(shown)
        columns["item_id"] += [ids[i] for i in shown]
        columns["item_text"] += [item_text(titles[i]) for i in shown]
        columns["item_embedding"] += list(rng.normal(size=(len(shown), _EMBEDDING)).astype(np.float32))
        columns["retrieval_score"] += rng.normal(size=len(shown)).tolist()
        columns["rank_score"] += rng.normal(size=len(shown)).tolist()
        columns["origin"] += ["made up"] * len(shown)
        columns["label"] += (np.arange(len(shown)) % 8 == 0).astype(float).tolist()
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / "lists.parquet")
    distill(folder / "lists.parquet", items, folder / "student", config=DistillConfig(), version="1")
    return RunDirectory.open(folder / "run").add_files(folder / "student", "reranker/1", {"rerankers": ["1"]})
