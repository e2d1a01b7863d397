"""Items spread over several indexes by key; the answers merged. Shape legend: B queries, D dimension, K neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from recsys.candidates.nearest.base import Keys, VectorIndex, Vectors
from recsys.candidates.nearest.exact import merge
from recsys.core import BadInput
from recsys.core.attributes import EVERYTHING, Where


def shard_of(item_key: Keys, num_shards: int) -> npt.NDArray[np.int64]:
    """Shard of each key [N]: its low bits have been through a hash, so a remainder spreads them."""
    return item_key % num_shards


class ShardedIndex:
    """Implements VectorIndex over shards: in this process, or behind whatever implements VectorIndex."""

    def __init__(self, shards: Sequence[VectorIndex]) -> None:
        """shards[i] holds the keys of which shard_of says i.

        Raises: BadInput for no shards, or shards of different dimensions.
        """
        dims = sorted({shard.dim for shard in shards})
        if len(dims) != 1:
            raise BadInput("index shards", came=f"dimensions {dims}", expected="one dimension", fix="Use one run's.")
        self.shards, self.dim = tuple(shards), dims[0]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def search(self, vectors: Vectors, k: int, where: Where = EVERYTHING) -> tuple[Keys, Vectors]:
        """See VectorIndex."""
        return merge([shard.search(vectors, k, where) for shard in self.shards], k)
