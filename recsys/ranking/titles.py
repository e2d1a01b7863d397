"""How alike titles are: the vectors that the towers were trained with, for the ranker's features. Light: no torch.

Shape legend: N items, M items of the run, T width of a text vector.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from recsys.core import CorruptData, RunDirectory
from recsys.core.ids import find_rows

_FILE, _KEY, _TEXT = "models/tower.safetensors", "items.key", "items.text"
_ROWS = 65_536  # at a time: bounds memory in full width
_LARGEST = 127  # of a vector's numbers, in a byte
Floats = npt.NDArray[np.float32]


class Titles:
    """Vectors of the run's titles, a byte a number: cosines are off by less than .01. What all titles have in common is
    taken off first: it would make every two of them alike.
    """

    def __init__(self, item_key: npt.NDArray[np.int64], text: npt.NDArray[np.float16]) -> None:
        """item_key: [M], ascending. text: [M, T], zeros where there is no title."""
        said = np.asarray(text.any(axis=1))
        mean = text.sum(axis=0, dtype=np.float32) / max(int(said.sum()), 1)
        self._item_key, self._vectors = item_key, np.zeros((len(text) + 1, text.shape[1]), np.int8)
        for start in range(0, len(text), _ROWS):
            part = slice(start, start + _ROWS)
            apart = (text[part] - mean) * said[part, None]
            largest = np.abs(apart).max(axis=1, keepdims=True, initial=1e-6)
            self._vectors[:-1][part] = np.rint(apart * (_LARGEST / largest))

    @classmethod
    def load(cls, run: RunDirectory) -> Titles | None:
        """Of a run, once for all arms of a process; None where it has no towers, or those read no titles.

        Raises: CorruptData.
        """
        return _read(run.path(_FILE), run.manifest["files"][_FILE]["sha256"]) if run.has(_FILE) else None

    def of(self, item_key: npt.NDArray[np.int64]) -> Floats:
        """Vectors of length 1 [N, T]; zeros for an item without a title, or one that the run does not know."""
        vectors: Floats = self._vectors[find_rows(self._item_key, item_key)].astype(np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1.0)
        return vectors


@lru_cache(maxsize=2)  # the run that serves, and the one that takes over
def _read(path: Path, _sha256: str) -> Titles | None:
    """_sha256: tells a run from another that was trained into its place."""
    try:
        with safe_open(path, framework="numpy") as file:
            return Titles(file.get_tensor(_KEY), file.get_tensor(_TEXT)) if _TEXT in set(file.keys()) else None
    except SafetensorError as error:
        raise CorruptData(
            f"run {path.parents[1]}, {_FILE}",
            came=str(error),
            expected="a safetensors file",
            fix="Copy the run again, or train again.",
        ) from error
