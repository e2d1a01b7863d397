"""[heavy] The live index against FAISS's exact scan and its plain approximate indexes, on one thread.

Throughput is that of each one's best batch; recall is on queries that nothing was tuned on. Then one query at a time,
as a request asks: under a thousand upserts a second with rebuilds behind them, and through filters.
A peer of its own is the exact scan as blocks of matrix products, which beats FAISS's at 100 neighbours.

Shape legend: M items, D dimension, Q queries, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from recsys.bench.harness import Contest, Row, figure, measure
from recsys.bench.live import under_writes
from recsys.bench.vectors import made_vectors
from recsys.candidates.nearest.exact import exact_search
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.monitor import RecallMonitor
from recsys.candidates.nearest.static import AnnIndex
from recsys.candidates.nearest.tuning import doubling_grid, least_effort, recall
from recsys.core import RunDirectory
from recsys.core.attributes import Where
from recsys.models.config import IndexConfig, LiveIndexConfig

_DIM, _K = 64, 100
_TARGET = 0.95  # what the plain peers are tuned to, on queries they are then judged by: an advantage they may have
_SELECTIVITIES = (0.5, 0.1, 0.01, 0.001)
_BATCHES = (1, 16, 64, 256, 1_024)
Vectors = npt.NDArray[np.float32]
Search = Callable[[Vectors], npt.NDArray[np.int64]]


def bench(quick: bool, run: Path | None = None) -> tuple[dict[str, Any], list[Row]]:
    """Throughput, recall, build, memory; latency under writes; filters. run: use the item vectors of its tower."""
    faiss.omp_set_num_threads(1)
    queries, repeats = (40, 2) if quick else (1_000, 5)
    items = 4_000 if quick else 1_000_000
    vectors, asked, known = _made(items, queries) if run is None else _of_run(run, queries, 0 if quick else items)
    settings = IndexConfig(kind="ivf")
    config: dict[str, Any] = {
        "items": len(vectors), "dim": vectors.shape[1], "k": _K, "queries": len(asked), "repeats": repeats,
        "threads": 1, "recall_target": settings.recall_target, "source": "generator" if run is None else str(run),
    }  # fmt: skip
    exact = faiss.IndexFlatIP(vectors.shape[1])
    exact.add(vectors)
    true = exact_search(vectors, asked, _K)[0]
    started = time.process_time()
    base = AnnIndex.build(np.arange(len(vectors), dtype=np.int64), vectors, settings, queries=known)
    built_s = time.process_time() - started
    config["tuned"] = dict(base.engine.tuned)
    live = LiveIndex(base, config=settings)
    peers = {"faiss IVF1024,Flat": _plain_ivf(vectors, asked, true), "faiss HNSW32": _plain_hnsw(vectors, asked, true)}
    searches: dict[str, Search] = {
        "double11 LiveIndex": lambda q: live.search(q, _K)[0],
        "faiss IndexFlatIP": lambda q: exact.search(q, _K)[1],
        "exact by matrix products": lambda q: exact_search(vectors, q, _K)[0],
        **{name: search for name, (search, _, _) in peers.items()},
    }
    batch = {name: _best_batch(search, asked) for name, search in searches.items()}
    config["batch"] = batch
    rows = _throughput(searches, batch, asked, repeats)
    rows.append(figure(f"recall@{_K}, unseen queries", "share", recall(live.search(asked, _K)[0], true), limit=1.0))
    for name, (search, build_s, effort) in peers.items():
        rows.append(figure(f"recall@{_K}, {name} {effort}", "share", recall(search(asked), true), limit=1.0))
        rows.append(figure(f"build, {name}", "cpu_s", build_s))
    rows.append(figure("build with tuning", "cpu_s", built_s))
    rows += _sizes(base)
    rows += _filters(live, vectors, asked[: min(len(asked), 200)])
    del peers, searches  # their memory
    fresh = made_vectors(50_000 if not quick else 500, vectors.shape[1], part=2)
    monitor = RecallMonitor(live, LiveIndexConfig())  # what a worker has running
    written, facts = under_writes(live, fresh, asked, quick)
    monitor.close()
    config["writes"] = facts
    return config, rows + written


def _made(items: int, queries: int) -> tuple[Vectors, Vectors, None]:
    """Items, queries, and none to tune on: items stand for those."""
    return made_vectors(items, _DIM), made_vectors(queries, _DIM, part=1), None


def _of_run(root: Path, queries: int, items: int) -> tuple[Vectors, Vectors, Vectors]:
    """Item vectors of a run's tower, grown to so many items; of a sample that is not among them one half is asked
    with, and the other is what training gives the index: a sample of what it will be asked with.
    """
    from recsys.models.tower import Tower

    vectors = Tower.load(RunDirectory.open(root)).item_vectors()[1]
    drawn = np.random.default_rng(1).permutation(len(vectors))
    held = drawn[: min(2 * queries, len(vectors) // 5)]
    asked, known = np.array_split(held, 2)
    return _grown(np.delete(vectors, held, axis=0), items), vectors[asked], vectors[known]


def _grown(vectors: Vectors, items: int) -> Vectors:
    """Further items as far from one of the tower's as those are from their nearest neighbours: no catalogue that we
    may use is larger, and copies would be no task.
    """
    more = items - len(vectors)
    if more <= 0:
        return vectors
    rng = np.random.default_rng(6)
    some = vectors[rng.permutation(len(vectors))[:1_000]]
    near = np.sqrt(np.maximum(2 - 2 * exact_search(vectors, some, 2)[1][:, 1], 0))
    step = rng.normal(size=(more, vectors.shape[1])).astype(np.float32)
    step *= (rng.choice(near, more) / np.linalg.norm(step, axis=1))[:, None].astype(np.float32)
    made = vectors[rng.integers(0, len(vectors), more)] + step
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return np.concatenate([vectors, made])


def _plain_ivf(vectors: Vectors, asked: Vectors, true: npt.NDArray[np.int64]) -> tuple[Search, float, str]:
    started, dim = time.process_time(), vectors.shape[1]
    lists = min(1_024, max(len(vectors) // 40, 1))
    index: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(len(vectors) // (64 * lists), 1)])
    index.add(vectors)
    built_s, params = time.process_time() - started, _faiss().IVFSearchParameters

    def search(probes: int) -> Search:
        return lambda q: np.asarray(index.search(q, _K, params=params(nprobe=probes))[1])

    return _at_target(search, doubling_grid(lists), asked, true, built_s, "nprobe")


def _plain_hnsw(vectors: Vectors, asked: Vectors, true: npt.NDArray[np.int64]) -> tuple[Search, float, str]:
    started = time.process_time()
    index: Any = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    built_s, params = time.process_time() - started, _faiss().SearchParametersHNSW

    def search(ef: int) -> Search:
        return lambda q: np.asarray(index.search(q, _K, params=params(efSearch=ef))[1])

    return _at_target(search, [64, 100, 128, 160, 200, 256, 384, 512], asked, true, built_s, "efSearch")


def _faiss() -> Any:
    return faiss  # its stubs lack the search parameters


def _at_target(
    search: Callable[[int], Search],
    grid: list[int],
    asked: Vectors,
    true: npt.NDArray[np.int64],
    built_s: float,
    name: str,
) -> tuple[Search, float, str]:
    effort = least_effort(lambda e: (search(e)(asked), np.empty(0, np.float32)), grid, true, _TARGET)
    value = effort.value if effort else grid[-1]
    return search(value), built_s, f"{name} {value}"


def _best_batch(search: Search, asked: Vectors) -> int:
    """The batch size of the most queries per second of CPU time."""

    def cost(batch: int) -> float:
        some = asked[: max(batch, 64)]
        started = time.process_time()
        _in_batches(search, some, batch)
        return (time.process_time() - started) / len(some)

    return min((b for b in _BATCHES if b <= len(asked)), key=cost)


def _in_batches(search: Search, asked: Vectors, batch: int) -> float:
    for at in range(0, len(asked), batch):
        search(asked[at : at + batch])
    return len(asked)


def _throughput(searches: dict[str, Search], batch: dict[str, int], asked: Vectors, repeats: int) -> list[Row]:
    names = list(searches)
    some = {name: asked[:200] if "Flat" in name or "exact" in name else asked for name in names}

    def work(name: str) -> tuple[str, Callable[[], float]]:
        return f"{name}, batch {batch[name]}", lambda: _in_batches(searches[name], some[name], batch[name])

    ours, *others = (work(name) for name in names)
    contests = [Contest(what=f"searches against {o[0]}", unit="per_s", ours=ours, peer=o) for o in others]
    return measure(contests, repeats=repeats)


def _sizes(base: AnnIndex) -> list[Row]:
    with TemporaryDirectory() as folder:
        base.save(Path(folder), "bench")
        stored = sum(p.stat().st_size for p in Path(folder).iterdir())
    vectors = base.engine.vectors.nbytes
    return [figure("index in memory and on disk", "MB", stored / 1e6, limit=vectors / 1e6)]


def _filters(live: LiveIndex, vectors: Vectors, asked: Vectors) -> list[Row]:
    """One query at a time through a price range, where prices are random, and where they go by nearness to one item."""
    rows: list[Row] = []
    prices = {
        "random": np.random.default_rng(3).permutation(len(vectors)),
        "clustered": np.argsort(np.argsort(-(vectors @ vectors[0]), kind="stable"), kind="stable"),
    }
    for name, price in prices.items():
        live.update(np.arange(len(vectors)), price_minor=price)
        for share in _SELECTIVITIES:
            where = Where(price_max_minor=max(int(share * len(live)), 1) - 1)
            rows += _filtered(live, asked, where, f"{name} filter, {share:.1%} left")
    return rows


def _filtered(live: LiveIndex, asked: Vectors, where: Where, what: str) -> list[Row]:
    right = live.exact(asked, _K, where)[0]
    live.search(asked[:1], _K, where)  # compiles the filter
    spent, got = [], []
    for query in asked:
        started = time.perf_counter()
        got.append(live.search(query[None], _K, where)[0][0])
        spent.append((time.perf_counter() - started) * 1e3)
    found = np.stack(got)
    return [
        figure(f"{what}: recall@{_K}", "share", recall(found, right), limit=1.0),
        figure(
            f"{what}: results given of those that exist", "share", (found >= 0).sum() / (right >= 0).sum(), limit=1.0
        ),
        figure(f"{what}: latency p50", "ms", float(np.quantile(spent, 0.5))),
        figure(f"{what}: latency p99", "ms", float(np.quantile(spent, 0.99))),
    ]
