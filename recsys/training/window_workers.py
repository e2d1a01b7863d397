"""Windows prepared by several processes of this host; each depends on nothing but the data.

A worker does what training would do, window run and candidate lists, and leaves them in the working folder; training
then finds them there. Sharded training of one model over processes is another thing, under `torchrun`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from recsys.core import Internal
from recsys.data import Dataset
from recsys.training.lists import window_lists
from recsys.training.settings import Settings
from recsys.training.windows import Window


def prepare(dataset: Dataset, windows: list[Window], *, seed: int, settings: Settings, work: Path, nproc: int) -> None:
    """Make every window's run and lists in `work` with `nproc` processes.

    Raises: Internal when a worker fails; its own message is on stderr, and the others are stopped.
    """
    fixed = [str(dataset.root), str(work), str(seed), json.dumps(settings.as_dict())]
    shares = [windows[i::nproc] for i in range(min(nproc, len(windows)))]
    workers = [
        subprocess.Popen([sys.executable, "-m", __name__, *fixed, *(f"{w.from_us}:{w.to_us}" for w in share)])
        for share in shares
    ]
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if any(codes):
        raise Internal(
            "training windows",
            came=f"exit codes {codes} of the workers",
            expected="0",
            fix="Their message is above; train with --nproc 1 to see it alone.",
        )


def main(argv: Sequence[str]) -> None:
    """One worker: DATASET WORK SEED SETTINGS FROM:TO..."""
    root, work, seed, settings, *spans = argv
    windows = [Window(*map(int, span.split(":"))) for span in spans]
    window_lists(
        Dataset.open(root), windows, seed=int(seed), settings=Settings.from_dict(json.loads(settings)), work=Path(work)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
