"""Candidates: N items as columns, what every stage between retrieval and the slate passes on.

Shape legend: N candidates, S score columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SOURCES_MAX = 32  # bits of source_bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Columns over N distinct items.

    item_key: int64 [N]. source_bits: uint32 [N], bit i set = the i-th name of `source_names` gave the item.
    scores: float32 [N, S], column j is `score_names[j]`; NaN where that stage or source said nothing.
    """

    item_key: npt.NDArray[np.int64]
    source_bits: npt.NDArray[np.uint32]
    scores: npt.NDArray[np.float32]
    source_names: tuple[str, ...]
    score_names: tuple[str, ...]

    @classmethod
    def from_source(cls, name: str, item_key: npt.NDArray[np.int64], score: npt.NDArray[np.float32]) -> Candidates:
        """Candidates of one source: its bit 0, its score the one column, both called `name`."""
        n = len(item_key)
        return cls(
            item_key=np.ascontiguousarray(item_key, dtype=np.int64),
            source_bits=np.ones(n, dtype=np.uint32),
            scores=np.asarray(score, dtype=np.float32).reshape(n, 1),
            source_names=(name,),
            score_names=(name,),
        )

    @classmethod
    def empty(cls, source_names: tuple[str, ...] = (), score_names: tuple[str, ...] = ()) -> Candidates:
        """No candidates."""
        return cls(
            item_key=np.empty(0, np.int64),
            source_bits=np.empty(0, np.uint32),
            scores=np.empty((0, len(score_names)), np.float32),
            source_names=source_names,
            score_names=score_names,
        )

    def __len__(self) -> int:
        return len(self.item_key)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Candidates:
        """Rows by index or mask, order as given."""
        return Candidates(
            item_key=self.item_key[rows],
            source_bits=self.source_bits[rows],
            scores=self.scores[rows],
            source_names=self.source_names,
            score_names=self.score_names,
        )

    def score(self, name: str) -> npt.NDArray[np.float32]:
        """One score column [N]; all NaN when no stage wrote it."""
        if name not in self.score_names:
            return np.full(len(self), np.nan, np.float32)
        return self.scores[:, self.score_names.index(name)]

    def with_score(self, name: str, values: npt.NDArray[np.float32]) -> Candidates:
        """A copy with one score column added, or replaced when it is there."""
        values = np.asarray(values, dtype=np.float32).reshape(len(self), 1)
        keep = [i for i, n in enumerate(self.score_names) if n != name]
        return Candidates(
            item_key=self.item_key,
            source_bits=self.source_bits,
            scores=np.concatenate([self.scores[:, keep], values], axis=1),
            source_names=self.source_names,
            score_names=(*(self.score_names[i] for i in keep), name),
        )

    def positions(self, name: str, group: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.float32]:
        """Position from 0 of every row by one score column [N], highest first, ties by key; NaN where it is NaN.

        group: count the rows where it is true and those where it is false apart [N].
        """
        score = self.score(name)
        apart = np.zeros(len(self), np.bool_) if group is None else group
        order = np.lexsort((self.item_key, -score, apart))
        position = np.empty(len(self), np.float32)
        position[order] = np.arange(len(self), dtype=np.float32)
        position[apart] -= np.float32(len(self) - np.count_nonzero(apart))
        position[np.isnan(score)] = np.nan
        return position

    def sources_of(self, row: int) -> tuple[str, ...]:
        """Names of the sources that gave the item in `row`."""
        bits = int(self.source_bits[row])
        return tuple(n for i, n in enumerate(self.source_names) if bits >> i & 1)
