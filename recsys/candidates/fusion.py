"""One order from what all sources say: the score of the retrieval tier.

Shape legend: N merged items.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.core import Candidates, CorruptData, RunDirectory

FILE = "models/fusion.json"


@dataclass(frozen=True, slots=True)
class Fusion:
    """How much each source counts, by name: where anything may come back, and where only new items may.

    Learnt from the training windows (recsys.training.fusion), because what a source is worth depends on the shop:
    titles say much about video games and nothing where the catalogue has none.
    """

    all: Mapping[str, float]
    new_only: Mapping[str, float]

    def of(self, *, new_only: bool) -> Mapping[str, float]:
        """The weights of a task."""
        return self.new_only if new_only else self.all

    def save(self, path: Path) -> None:
        """Write FILE of a run."""
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True), "utf-8")

    @classmethod
    def load(cls, run: RunDirectory) -> Fusion:
        """A run's. Raises: CorruptData."""
        try:
            stored: dict[str, Any] = json.loads(run.path(FILE).read_text("utf-8"))
            return cls(**{task: {str(k): float(v) for k, v in said.items()} for task, said in stored.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise CorruptData(
                f"run {run.run_id}, {FILE}",
                came=str(error),
                expected="weights by source, for all and new_only",
                fix="Copy the run again, or train again.",
            ) from error


def share(score: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """A source's score by its place between its lowest and highest among these candidates, 0 where it is silent [N]."""
    value = score.astype(np.float64)
    said = np.isfinite(value)
    if said.any():
        low, high = value[said].min(), value[said].max()
        value = (value - low) / (high - low) if high > low else np.ones(len(value))
    return np.where(said, value, 0.0)


def counted(score: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """A score that counts something, each doubling worth as much as the one before: log2(1 + score), silence 0 [N]."""
    return np.log2(1.0 + np.where(np.isfinite(score), np.maximum(score, 0.0), 0.0).astype(np.float64))


def worth(score: npt.NDArray[np.float32], absolute: bool) -> npt.NDArray[np.float64]:
    """What a source's weight is multiplied with [N]; score: its own, of the candidates of one request."""
    return counted(score) if absolute else share(score)


def fuse(found: Candidates, weights: Mapping[str, float], absolute: Collection[str] = ()) -> npt.NDArray[np.float32]:
    """One score from the sources' own: sum of weight x score, 0 where a source is silent. Shape [N].

    A score counts by its `share`, except for the `absolute` sources, whose scores have a unit of their own (own
    history: days with a purchase) and count as `counted`: a shopper who bought a thing ten times says more than one who
    bought it once, though for both it is their first.
    Source: CombSUM with min-max normalisation (Fox & Shaw, TREC-2 1994; Lee, SIGIR 1997).
    """
    total = np.zeros(len(found), np.float64)
    for name, weight in weights.items():
        total += weight * worth(found.score(name), name in absolute)
    return total.astype(np.float32)
