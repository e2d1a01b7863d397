"""What an index of item vectors promises.

Shape legend: M items, B queries, D dimension, K neighbours.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from recsys.core.attributes import EVERYTHING, Where

Keys = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


class VectorIndex(Protocol):
    """Item vectors under their keys, searched by inner product."""

    @property
    def dim(self) -> int:
        """Dimension D."""
        ...

    def __len__(self) -> int:
        """Items that are there, sold-out ones among them."""
        ...

    def search(self, vectors: Vectors, k: int, where: Where = EVERYTHING) -> tuple[Keys, Vectors]:
        """Keys [B, K] and inner products [B, K] of the nearest items that `where` admits, best first.

        K = k. Fewer than k items come back only where fewer exist; the rest of a row is key -1, score -inf.
        Raises: VersionMismatch for vectors of another dimension; BadInput for what is not finite.
        """
        ...
