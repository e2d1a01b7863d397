"""Training of a small tower in processes of its own, which a test can kill at a step.

    python training_world.py DATASET WORK OUT KILL_STEP     one rank; under torchrun, one of several

Writes the losses and the item vectors to OUT (rank 0). A rank that reaches KILL_STEP kills itself as the kernel would.
"""

import atexit
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from gloo_threads import have_ended

STEP_OF_CHECKPOINTS = 5


def train(dataset: Path, work: Path, kill_step: int = -1, **changes: object) -> tuple[list[float], np.ndarray, object]:
    """Losses of the steps taken here, item vectors and the tower (rank 0)."""
    from recsys.data import Dataset
    from recsys.models.config import TowerConfig
    from recsys.training import TrainingConfig
    from recsys.training.base_run import known_events
    from recsys.training.loop import LossGuard
    from recsys.training.ranks import joined
    from recsys.training.tower_trainer import train_tower

    losses: list[float] = []

    class Watched(LossGuard):
        def check(self, loss, step, batch):
            if step == kill_step:
                os.kill(os.getpid(), signal.SIGKILL)
            losses.append(super().check(loss, step, batch))
            return losses[-1]

    opened = Dataset.open(dataset)
    until_us = opened.last_event_us + 1
    model = {n: int(changes.pop(n)) for n in ("dim", "item_rows_max") if n in changes}
    settings = {"tower_epochs": 2, "tower_examples_max": 2_000, "tower_batch": 256} | changes
    config = TrainingConfig(checkpoint_steps=STEP_OF_CHECKPOINTS, **settings)
    with joined() as ranks:
        tower = train_tower(
            known_events(opened, until_us),
            opened.item_table(before_us=until_us),
            config=config,
            model=TowerConfig(**{"dim": 16} | model, heads=2, history_items_max=10),
            seed=0,
            work=work,
            ranks=ranks,
            guard=Watched("tower", work, ranks.rank),
        )
    return losses, tower.item_vectors()[1], tower


def train_apart(
    nproc: int, dataset: Path, work: Path, out: Path, kill_step: int = -1
) -> subprocess.CompletedProcess[str]:
    """The same in `nproc` processes under torchrun, on a free port."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command = [sys.executable, *torchrun, __file__, str(dataset), str(work), str(out), str(kill_step)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DOUBLE11_PROGRESS": "0"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environ)


def read(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """What a training apart wrote: losses, item vectors."""
    with np.load(out) as made:
        return made["losses"], made["vectors"]


if __name__ == "__main__":
    atexit.register(have_ended)
    dataset, work, out, kill_step = sys.argv[1:]
    made = train(Path(dataset), Path(work), int(kill_step))
    if os.environ.get("RANK", "0") == "0":
        np.savez(out, losses=made[0], vectors=made[1])
