"""The benchmark's model over bags: losses of all ranks' batches together, and weights, by all and by rank 0 alone.

torchrun bags_world.py OUT     writes losses_all, losses_alone and both nets' weights (rank 0)
"""

import atexit
import os
import sys
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from gloo_threads import have_ended, running

SIZES = {"rows": 5_000, "batch": 64, "steps": 6}


def main(out: str) -> None:
    """Same start, same samples: each rank a batch of its own, rank 0 alone then all of them at once."""
    from recsys.bench.train import Ours, make_batches
    from recsys.training.ranks import joined

    torch.set_num_threads(1)
    with joined() as ranks:
        loops = running("gloo_tcp_loop")  # none: it has another name now
        assert {os.sched_getscheduler(loop) for loop in loops} == {os.SCHED_BATCH}
        alone = [dist.new_group([rank]) for rank in range(ranks.size)]
        batches = [make_batches(SIZES, seed=rank) for rank in range(ranks.size)]
        torch.manual_seed(0)
        model, own = Ours(ranks, SIZES), batches[ranks.rank]
        losses = [model.step(b, after) for b, after in zip(own, [*own[1:], None], strict=True)]
        summed = ranks.sum(torch.tensor(losses, dtype=torch.float64))
        weights = model.sharded.whole()
        if not ranks.leads:
            return
        torch.manual_seed(0)
        one = Ours(
            replace(ranks, rank=0, size=1, local_size=1, group=alone[0]), SIZES | {"batch": SIZES["batch"] * ranks.size}
        )
        whole = [tuple(np.concatenate(part) for part in zip(*step, strict=True)) for step in zip(*batches, strict=True)]
        losses_alone = [one.step(batch) for batch in whole]
        made = {f"all.{n}": w for n, w in weights.items()} | {f"alone.{n}": w for n, w in one.sharded.whole().items()}
        np.savez(out, losses_all=summed, losses_alone=losses_alone, **made)


if __name__ == "__main__":
    atexit.register(have_ended)
    main(sys.argv[1])
