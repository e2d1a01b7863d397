"""Training: windows, towers, ranker lists, the assembly of a run, rerank lists.

Light names only: what imports torch is imported by `train` when it is called.
"""

from __future__ import annotations

from pathlib import Path

from recsys.core import RunDirectory
from recsys.training.config import TrainingConfig
from recsys.training.settings import Settings

__all__ = ["Settings", "TrainingConfig", "train"]


def train(
    dataset_dir: Path | str,
    out: Path | str,
    *,
    until_us: int | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    replace: bool = False,
    nproc: int = 1,
) -> RunDirectory:
    """Train a whole run on events strictly before `until_us`; see `recsys.training.assemble.train`."""
    from recsys.training import assemble

    return assemble.train(
        dataset_dir, out, until_us=until_us, seed=seed, settings=settings, replace=replace, nproc=nproc
    )
