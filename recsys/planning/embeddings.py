"""[heavy] Where TorchRec's planner would put embedding tables, and what it estimates for memory and step time.

The figures are the planner's own model (bytes moved over nominal bandwidths), not measurements.
Source: torchrec.distributed.planner, EmbeddingShardingPlanner.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError

from recsys.core import BadInput

logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)  # advice to whoever writes planners

_RANKS_SEARCHED_MAX = 64  # beyond, TorchRec's search over all combinations takes hours
_INFERIOR_MAX = 100  # proposals in a row that are no better before the greedy search stops
_ROWS_MAX, _DIM_MAX = 10**15, 1 << 16  # sizes that the planner can still multiply
_RESERVED = 0.15  # share of each device's memory left to activations and the dense part
_FIX = 'Write {"topology": {"world_size", "device"}, "batch_size", "tables": [{"name", "rows", "dim", "pooling"}]}.'


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One table. rows x dim float32; pooling: mean ids per sample of its feature."""

    name: str
    rows: int
    dim: int
    pooling: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The devices. device: cuda or cpu. Memory per rank in GiB; per_host: ranks of one host."""

    world_size: int
    device: str = "cuda"
    hbm_gib: float = 80.0
    ddr_gib: float = 128.0
    per_host: int = 8


def parse(document: Any) -> tuple[Cluster, list[Table], int]:
    """Check a description: (cluster, tables, batch size per rank).

    Raises: BadInput.
    """
    if not isinstance(document, Mapping) or not document.get("tables"):
        raise BadInput(
            "embeddings description", came=f"{document!r:.80}", expected="a JSON object with tables", fix=_FIX
        )
    try:
        cluster = Cluster(**document.get("topology", {}))
        tables = [Table(**t) for t in document["tables"]]
        batch_size = document.get("batch_size", 1024)
    except (TypeError, ValueError) as error:
        raise BadInput("embeddings description", came=str(error), expected="known keys", fix=_FIX) from error
    names = [t.name for t in tables]
    if not all(isinstance(n, str) and n and "." not in n for n in names) or len(set(names)) < len(names):
        expected = "names without a dot, each once"
        raise BadInput("embeddings description", came=f"tables {names}", expected=expected, fix=_FIX)
    wrong = [t for t in tables if not _possible(t)]
    if wrong or not _is_there(cluster) or not _is_whole(batch_size, _ROWS_MAX):
        came = ", ".join(map(str, wrong)) if wrong else f"{cluster}, batch size {batch_size!r}"
        expected = (
            "rows, world_size, per_host and batch_size whole numbers from 1 (1e6 is none), "
            f"dim a multiple of 4 up to {_DIM_MAX}, pooling above 0, device cuda or cpu"
        )
        raise BadInput("embeddings description", came=came, expected=expected, fix=_FIX)
    return cluster, tables, batch_size


def _possible(table: Table) -> bool:
    whole = _is_whole(table.rows, _ROWS_MAX) and _is_whole(table.dim, _DIM_MAX) and table.dim % 4 == 0
    return whole and _is_number(table.pooling) and table.pooling > 0


def _is_there(cluster: Cluster) -> bool:
    whole = _is_whole(cluster.world_size, _ROWS_MAX) and _is_whole(cluster.per_host, _ROWS_MAX)
    return whole and _is_number(cluster.hbm_gib) and _is_number(cluster.ddr_gib) and cluster.device in ("cuda", "cpu")


def _is_whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _ROWS_MAX


def plan(cluster: Cluster, tables: list[Table], batch_size: int) -> dict[str, Any]:
    """The planner's choice per table, memory per rank (GiB), step time (ms, of the slowest rank).

    batch_size: samples per rank. Nothing is allocated: tables are on the meta device.
    Raises: BadInput when the tables fit in no way.
    """
    bags = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=t.name, num_embeddings=t.rows, embedding_dim=t.dim, feature_names=[t.name])
            for t in tables
        ],
    )
    gib = 2**30
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=cluster.world_size,
            compute_device=cluster.device,
            hbm_cap=int(cluster.hbm_gib * gib) if cluster.device == "cuda" else 0,
            ddr_cap=int(cluster.ddr_gib * gib),
            local_world_size=min(cluster.per_host, cluster.world_size),
        ),
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(_RESERVED),
        constraints={t.name: ParameterConstraints(pooling_factors=[t.pooling]) for t in tables},
        proposer=[UniformProposer(), GreedyProposer(use_depth=False, threshold=_INFERIOR_MAX)]
        if cluster.world_size > _RANKS_SEARCHED_MAX
        else None,
        debug=False,
    )
    try:
        planner.plan(bags, [EmbeddingBagCollectionSharder()])
    except PlannerError as error:
        raise BadInput(
            "embedding tables",
            came=str(error).splitlines()[0],
            expected=f"tables that fit {cluster.world_size} ranks",
            fix="Add ranks or memory, or shrink rows or dim.",
        ) from error
    best = planner._best_plan or []  # the public plan leaves out storage and time
    memory: defaultdict[int, float] = defaultdict(float)
    step_ms: defaultdict[int, float] = defaultdict(float)
    placed = []
    for option in best:
        for shard in option.shards:
            memory[shard.rank] += (shard.storage.hbm + shard.storage.ddr) / gib
            step_ms[shard.rank] += shard.perf.total
        ranks = [s.rank for s in option.shards]
        placed.append(
            {"table": option.name, "sharding": option.sharding_type, "kernel": option.compute_kernel, "ranks": ranks}
        )
    return {
        "estimate_of": "torchrec EmbeddingShardingPlanner",
        "tables": placed,
        "memory_gib_by_rank": {str(r): round(memory[r], 3) for r in range(cluster.world_size)},
        "step_ms_estimate": round(max(step_ms.values(), default=0.0), 3),
    }
