"""Rows of an index, an item's links or a category's list, as they travel from who makes them to who looks them up.

Shape legend: R rows, E entries of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.core.errors import CorruptData


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IndexRows:
    """Whole rows: each replaces what its key had, and may be empty.

    key [R] distinct; num [R]: how many of the entries are each one's, in order; entry_key [E], score [E]: of one row
    together, best first.
    """

    key: npt.NDArray[np.int64]
    num: npt.NDArray[np.int64]
    entry_key: npt.NDArray[np.int64]
    score: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        """Raises: CorruptData for columns that contradict each other, and for scores that are not finite."""
        entries = int(self.num.sum())
        whole = len(self.key) == len(self.num) and (self.num >= 0).all()
        if not whole or not entries == len(self.entry_key) == len(self.score) or not np.isfinite(self.score).all():
            raise CorruptData(
                "rows of an index",
                came=f"{len(self.key)} keys, {len(self.num)} numbers that add up to {entries}, "
                f"{len(self.entry_key)} entries, {len(self.score)} scores",
                expected="one number a key, as many entries and finite scores as they add up to",
                fix="Find out who wrote this record; skip it.",
            )

    def __len__(self) -> int:
        """Rows."""
        return len(self.key)
