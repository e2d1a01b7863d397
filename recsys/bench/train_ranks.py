"""[heavy] What `bench train` starts under torchrun: rank 0 alone, then all, in turn. Arguments: sizes as JSON, OUT."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recsys.bench.train import Batch, Ours, make_batches
from recsys.training.ranks import Ranks, joined

_WARMUPS = 1


def main(sizes_json: str, out: str) -> None:
    """Rounds of both kinds; rank 0 writes {"one": [...], "two": [...], "sharding"}, a dictionary of seconds a round."""
    sizes = json.loads(sizes_json)
    torch.set_num_threads(1)
    with joined() as ranks, ranks.own_cores():
        groups = [dist.new_group([rank]) for rank in range(ranks.size)]  # each rank has to take part in each
        batches = make_batches(sizes, seed=ranks.rank)
        both = Ours(ranks, sizes)
        one = Ours(replace(ranks, rank=0, size=1, local_size=1, group=groups[0]), sizes) if ranks.leads else None
        rounds: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
        for number in range(_WARMUPS + sizes["repeats"]):
            ranks.wait_for_all()
            if one is not None:
                alone = _round(one, batches, samples=sizes["batch"] * len(batches))
            ranks.wait_for_all()
            together = _round(both, batches, samples=sizes["batch"] * len(batches) * ranks.size)
            together["cpu_s"] = _most(together["cpu_s"], ranks)
            together["wall_s"] = _most(together["wall_s"], ranks)
            if one is not None and number >= _WARMUPS:
                rounds["one"].append(alone)
                rounds["two"].append(together)
        if ranks.leads:
            Path(out).write_text(json.dumps(rounds | {"sharding": both.sharding}), "utf-8")


def _round(model: Ours, batches: list[Batch], samples: int) -> dict[str, float]:
    """Seconds of wall and CPU of all steps, samples, and seconds of one step by part."""
    parts: dict[str, Any] = {}
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        model.step(batch, following)
        for part, seconds in model.seconds.items():
            parts[part] = parts.get(part, 0.0) + seconds / len(batches)
    return {
        "wall_s": time.perf_counter() - wall_s,
        "cpu_s": time.process_time() - cpu_s,
        "samples": float(samples),
        **parts,
    }


def _most(value: float, ranks: Ranks) -> float:
    worst = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=ranks.group)
    return float(worst)


if __name__ == "__main__":
    main(*sys.argv[1:])
