"""State: what a store keeps about entities, as rows of a few declared tables, and its packed binary form.

A table's rows are int64 words: key columns, then value columns. Rows of one entity and table are sorted by key and
unique. Every reducer is one operation, `feature_store.fold.merge`: rows with an equal key are combined column by
column (add, max, min), then only the greatest keys of each group are kept. As addition, maximum and minimum commute,
and a key once pushed out by greater keys could never come back, the state is a function of the set of events.

Shape legend: E entities, T tables, R rows of all entities, C columns, W words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from recsys.core import CorruptData

Words = npt.NDArray[np.int64]
_MAGIC = 0x0D11  # upper half of a blob's first word; the lower half is the blob's length in words
_ROWS_MAX = (1 << 16) - 1  # row counts are packed as 16-bit lanes


class Op(Enum):
    """How the values of two rows with the same key become one."""

    ADD = "add"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One declared table.

    key: names of the leading columns, ascending; all values are non-negative.
    values: the other columns and how they combine. A word may carry two 31-bit counts (ADD only).
    keep: most rows per group, by group number; None = as many as there are keys (a declared, small set).
    group_shift: group number = first key column >> group_shift; 63 makes the whole entity one group.
    """

    name: str
    key: tuple[str, ...]
    values: tuple[tuple[str, Op], ...] = ()
    keep: tuple[int, ...] | None = None
    group_shift: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        return (*self.key, *(name for name, _ in self.values))

    @property
    def width(self) -> int:
        """C, the number of columns."""
        return len(self.key) + len(self.values)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one table for E entities: entity e owns words[offsets[e]:offsets[e + 1]]. offsets [E+1], words [R, C]."""

    table: Table
    offsets: Words
    words: Words

    @classmethod
    def empty(cls, table: Table, num_entities: int) -> Rows:
        """No rows."""
        return cls(table, np.zeros(num_entities + 1, np.int64), np.empty((0, table.width), np.int64))

    @property
    def counts(self) -> Words:
        """Rows per entity [E]."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> Words:
        """Entity of each row [R]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    def __getitem__(self, column: str) -> Words:
        """One column [R]."""
        return self.words[:, self.table.columns.index(column)]

    def where(self, keep: npt.NDArray[np.bool_]) -> Rows:
        """The rows where keep [R] is true."""
        before = np.concatenate(([0], np.cumsum(keep)))
        return Rows(self.table, before[self.offsets], self.words[keep])


@dataclass(frozen=True, slots=True)
class State:
    """All tables of E entities of one kind, in declaration order."""

    rows: Mapping[str, Rows]

    @classmethod
    def empty(cls, tables: Sequence[Table], num_entities: int) -> State:
        """E entities nothing is known about."""
        return cls({t.name: Rows.empty(t, num_entities) for t in tables})

    def __getitem__(self, table: str) -> Rows:
        return self.rows[table]

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())).offsets) - 1


def encode(state: State) -> list[bytes]:
    """One blob per entity: a word of magic and length, row counts as 16-bit lanes, then each table's rows.

    An entity without rows becomes b"". Little-endian int64 words throughout.
    """
    tables = list(state.rows.values())
    counts_ET = np.stack([r.counts for r in tables], axis=1)
    assert int(counts_ET.max(initial=0)) <= _ROWS_MAX
    head = 1 + -(-len(tables) // 4)
    widths = np.array([r.table.width for r in tables])
    sizes_ET = counts_ET * widths
    total_E = head + sizes_ET.sum(axis=1)
    start_E = np.cumsum(total_E) - total_E
    out = np.empty(int(total_E.sum()), np.int64)
    out[start_E] = (_MAGIC << 32) | total_E
    lanes = np.zeros((len(counts_ET), (head - 1) * 4), np.uint16)
    lanes[:, : len(tables)] = counts_ET
    out[start_E[:, None] + np.arange(1, head)] = lanes.view(np.int64)
    at_E = start_E + head
    for i, rows in enumerate(tables):
        out[spread(at_E, sizes_ET[:, i])] = rows.words.reshape(-1)
        at_E = at_E + sizes_ET[:, i]
    data = out.astype("<i8", copy=False).tobytes()
    known: Words = counts_ET.sum(axis=1)
    ends = ((start_E + total_E) * 8).tolist()
    return [data[a:b] if k else b"" for a, b, k in zip((start_E * 8).tolist(), ends, known.tolist(), strict=True)]


def decode(tables: Sequence[Table], blobs: Sequence[bytes | memoryview]) -> State:
    """The inverse of `encode`; b"" is an unknown entity.

    Raises: CorruptData for a blob that this set of tables did not write.
    """
    head = 1 + -(-len(tables) // 4)
    sizes = np.fromiter((len(b) for b in blobs), np.int64, len(blobs))
    words = np.frombuffer(b"".join(blobs), "<i8") if not (sizes % 8).any() else None
    total_E = sizes // 8
    known = total_E > 0
    start_E = (np.cumsum(total_E) - total_E)[known]
    counts_ET = np.zeros((len(blobs), len(tables)), np.int64)
    widths = np.array([t.width for t in tables])
    if words is None or (total_E[known] < head).any() or (words[start_E] != (_MAGIC << 32) | total_E[known]).any():
        raise _corrupt("a blob without our header")
    lanes = words[start_E[:, None] + np.arange(1, head)].view(np.uint16)
    counts_ET[known] = lanes[:, : len(tables)]
    sizes_ET = counts_ET * widths
    if (sizes_ET.sum(axis=1)[known] + head != total_E[known]).any():
        raise _corrupt("row counts that do not add up to the blob's length")
    at_E = np.zeros(len(blobs), np.int64)
    at_E[known] = start_E + head
    rows = {}
    for i, table in enumerate(tables):
        offsets = np.fromiter(accumulate(counts_ET[:, i].tolist(), initial=0), np.int64, len(blobs) + 1)
        taken = words[spread(at_E, sizes_ET[:, i])].reshape(-1, table.width)
        rows[table.name] = Rows(table, offsets, taken)
        at_E = at_E + sizes_ET[:, i]
    return State(rows)


def spread(start_E: Words, length_E: Words) -> slice | Words:
    """Indices start[e] .. start[e] + length[e] of all entities, one after the other."""
    if len(start_E) == 1:
        return slice(int(start_E[0]), int(start_E[0] + length_E[0]))
    before = np.cumsum(length_E) - length_E
    at: Words = np.arange(int(length_E.sum())) + np.repeat(start_E - before, length_E)
    return at


def _corrupt(came: str) -> CorruptData:
    return CorruptData(
        "feature state",
        came=came,
        expected="a blob of this view set",
        fix="Rebuild the store: double11 features materialize DIR --store URL.",
    )
