"""Sets of row numbers as bits, in the layout of FAISS's IDSelectorBitmap: row r is bit r % 8 of byte r // 8."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
_WORD_ROWS = 64


class RowSet:
    """Some of the rows 0 to n - 1. Adding and removing is in place: readers see each row before or after."""

    __slots__ = ("bits", "n")

    def __init__(self, n: int, bits: npt.NDArray[np.uint8]) -> None:
        """bits: whole 64-bit words, zero from row n on. Use the other constructors."""
        self.n, self.bits = n, bits

    @classmethod
    def none(cls, n: int) -> RowSet:
        """The empty set."""
        return cls(n, np.zeros(-(-n // _WORD_ROWS) * 8, np.uint8))

    @classmethod
    def where(cls, mask: npt.NDArray[np.bool_]) -> RowSet:
        """Rows at which `mask` [n] is true."""
        made = cls.none(len(mask))
        packed = np.packbits(mask, bitorder="little")
        made.bits[: len(packed)] = packed
        return made

    @classmethod
    def of(cls, n: int, rows: Rows) -> RowSet:
        """The given rows."""
        made = cls.none(n)
        made.add(rows)
        return made

    def __len__(self) -> int:
        return int(np.bitwise_count(self.bits.view(np.uint64)).sum())

    def __and__(self, other: RowSet) -> RowSet:
        return RowSet(self.n, self.bits & other.bits)

    def copy(self) -> RowSet:
        """As it is now."""
        return RowSet(self.n, self.bits.copy())

    def mask(self) -> npt.NDArray[np.bool_]:
        """Bool [n]."""
        return np.unpackbits(self.bits, bitorder="little", count=self.n).view(np.bool_)

    def rows(self) -> Rows:
        """Row numbers, ascending."""
        return np.flatnonzero(self.mask())

    def has(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """True where a row is in the set, false for row -1; the shape is that of `rows`."""
        if not self.n:
            return np.zeros(rows.shape, np.bool_)
        held: npt.NDArray[np.bool_] = (rows >= 0) & ((self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1)
        return held

    def add(self, rows: Rows) -> None:
        """Put rows in."""
        np.bitwise_or.at(self.bits, rows >> 3, _bit(rows))

    def remove(self, rows: Rows) -> None:
        """Take rows out."""
        np.bitwise_and.at(self.bits, rows >> 3, ~_bit(rows))

    def put(self, rows: Rows, held: npt.NDArray[np.bool_]) -> None:
        """Put in the rows whose `held` is true, take out the others."""
        self.add(rows[held])
        self.remove(rows[~held])

    def count_between(self, starts: Rows) -> npt.NDArray[np.int64]:
        """Rows of the set from each start to the next [len(starts) - 1], to the precision of a 64-bit word."""
        words = np.bitwise_count(self.bits.view(np.uint64)).astype(np.int64)
        upto = np.concatenate([[0], np.cumsum(words)])
        return np.diff(upto[np.minimum(-(-starts // _WORD_ROWS), len(words))])


def _bit(rows: Rows) -> npt.NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (rows & 7).astype(np.uint8))
