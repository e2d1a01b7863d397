"""Items spread over several indexes by key: which shard has an item, and how the shards' answers are merged.

Shape legend: N items of a call, B queries, D dimension, K neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.candidates.nearest.base import Keys, VectorIndex, Vectors
from recsys.core import BadInput
from recsys.core.attributes import EVERYTHING, Where

SHARDS_MAX = 1_024


def shard_of(item_key: Keys, num_shards: int) -> npt.NDArray[np.int64]:
    """Shard of each key [N]: its low bits have been through a hash, so a remainder spreads them."""
    return item_key % num_shards


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of the items, `number` from 0; written "0/2"."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count <= SHARDS_MAX:
            raise _no_shard(str(self))

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "0/2". Raises: BadInput."""
        found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        if found is None:
            raise _no_shard(text)
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def whole(self) -> bool:
        """Whether it has all items."""
        return self.count == 1

    def holds(self, item_key: Keys) -> npt.NDArray[np.bool_]:
        """True [N] for items of this shard."""
        held: npt.NDArray[np.bool_] = shard_of(item_key, self.count) == self.number
        return held


WHOLE = Shard()


class ShardedIndex:
    """Implements VectorIndex over the shards of one process; those of other processes are `recsys.serving`'s."""

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


def merge(parts: Sequence[tuple[Keys, Vectors]], k: int) -> tuple[Keys, Vectors]:
    """The best k [B, K] of several answers to the same queries, ids -1 last; ties keep the order of the parts."""
    ids = np.concatenate([p[0] for p in parts], axis=1)
    scores = np.where(ids < 0, -np.inf, np.concatenate([p[1] for p in parts], axis=1)).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _no_shard(came: str) -> BadInput:
    return BadInput(
        "shard", came=came, expected=f"NUMBER/COUNT, e.g. 0/2 and 1/2, at most {SHARDS_MAX}", fix="Correct it."
    )
