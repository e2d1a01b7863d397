"""`double11 train --nproc N`: the training of one run on N processes of this host, started by torchrun.

On several hosts that share a file system, torchrun starts the command itself:

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        -m recsys.cli.main train DIR --out RUN
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from recsys.core import Internal
from recsys.training.settings import Settings


def launch(
    dataset: Path, out: Path, *, until_us: int, seed: int, settings: Settings, replace: bool, nproc: int
) -> None:
    """Train `out` with `nproc` processes; returns when it is whole.

    Raises: Internal when a process fails; its own message is on stderr, and the others are stopped.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), "-m", __name__]
    training = [str(dataset), str(out), str(until_us), str(seed), json.dumps(settings.as_dict()), str(int(replace))]
    code = subprocess.run([sys.executable, *torchrun, *training], check=False).returncode
    if code:
        raise Internal(
            "training processes",
            came=f"exit code {code} of torchrun",
            expected="0",
            fix="Their message is above; train with --nproc 1 to see it alone. The same command goes on from there.",
        )


def main(argv: Sequence[str]) -> None:
    """One process: DATASET OUT UNTIL_US SEED SETTINGS REPLACE."""
    from recsys.training.assemble import train

    dataset, out, until_us, seed, settings, replace = argv
    chosen = Settings.from_dict(json.loads(settings))
    train(dataset, out, until_us=int(until_us), seed=int(seed), settings=chosen, replace=bool(int(replace)))


if __name__ == "__main__":
    main(sys.argv[1:])
