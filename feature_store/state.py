"""State: what a store keeps about entities, as rows of a few declared tables, and its packed binary form.

A table's rows are int64 words: key columns, then value columns. Rows of one entity and table are sorted by key and
unique. Every reducer is one operation, `feature_store.fold.merge`: rows with an equal key are combined column by
column (add, max, min), then only the greatest keys of each group are kept. As addition, maximum and minimum commute,
and a key once pushed out by greater keys could never come back, the state is a function of the set of events.

In memory a table is kept by column. In its packed form every column has the bytes that its table declares
(`feature_store.narrow`); an entity of which one value does not fit is packed wide, all its words as they are.

Shape legend: E entities, T tables, R rows of all entities, C columns, W words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from feature_store.compiled import blobs as packed
from feature_store.compiled.blobs import Bytes
from feature_store.narrow import Words, layout_of
from recsys.core import CorruptData

__all__ = ["FORMAT", "Op", "Rows", "State", "Table", "Words", "decode", "encode", "spread"]

FORMAT = 2  # raise it when blobs change in another way than by their tables' declarations
# A blob's first word: these 16 bits, 16 of its form, its length in words; then its row counts as 16-bit lanes.
_MAGIC = 0x0D12
_NARROW, _WIDE = 0, 1
_ROWS_MAX = (1 << 16) - 1
_WRONG = (
    "a blob without our header",
    "row counts that do not add up to the blob's length",
    "a blob of broken words",
)  # by what `blobs.scan` returns


class Op(Enum):
    """How the values of two rows with the same key become one."""

    ADD = "add"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """One declared table; a table is equal to itself only.

    key: names of the leading columns, ascending; all values are non-negative.
    values: the other columns and how they combine. A word may carry two 31-bit counts (ADD only).
    keep: most rows per group, by group number; None = as many as there are keys (a declared, small set).
    span: how far a first key column may be behind the greatest of its group, by group number; None = any distance.
    group_shift: group number = first key column >> group_shift; 63 makes the whole entity one group.
    codes: bytes of each column in the packed form (`feature_store.narrow`); () = 8 each.
    """

    name: str
    key: tuple[str, ...]
    values: tuple[tuple[str, Op], ...] = ()
    keep: tuple[int, ...] | None = None
    span: tuple[int, ...] | None = None
    group_shift: int = 0
    codes: tuple[str, ...] = ()

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        return (*self.key, *(name for name, _ in self.values))

    @cached_property
    def width(self) -> int:
        """C, the number of columns."""
        return len(self.key) + len(self.values)

    def packing(self, form: int) -> tuple[str, ...]:
        """Codes of all columns in a form."""
        return self.codes if self.codes and form == _NARROW else self._wide

    @cached_property
    def _wide(self) -> tuple[str, ...]:
        return ("u8",) * self.width


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one table for E entities: entity e owns words[offsets[e]:offsets[e + 1]]. offsets [E+1], words [R, C]."""

    table: Table
    offsets: Words
    words: Words

    @classmethod
    def empty(cls, table: Table, num_entities: int) -> Rows:
        """No rows."""
        return cls(table, np.zeros(num_entities + 1, np.int64), np.empty((table.width, 0), np.int64).T)

    @property
    def columns(self) -> Words:
        """All columns [C, R], each contiguous."""
        return np.ascontiguousarray(self.words.T)

    @property
    def counts(self) -> Words:
        """Rows per entity [E]."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def owner(self) -> Words:
        """Entity of each row [R]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    def __getitem__(self, column: str) -> Words:
        """One column [R]."""
        return self.words[:, self.table.columns.index(column)]

    def where(self, keep: npt.NDArray[np.bool_]) -> Rows:
        """The rows where keep [R] is true."""
        before = np.zeros(len(keep) + 1, np.int64)
        np.cumsum(keep, out=before[1:])
        return Rows(self.table, before[self.offsets], self.words.T[:, keep].T)


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


@dataclass(frozen=True, slots=True)
class _Packing:
    """How the rows of some tables are packed, as `feature_store.compiled` takes it. Forms: narrow, wide.

    head: words before the rows. width_FT, by_table: words of a row. columns_T: number of columns. parts [P, 6] of all
    tables, parts_T of each. unused: per table [C].
    """

    head: int
    width_FT: Words
    by_table: tuple[Words, ...]
    columns_T: Words
    parts: Words
    parts_T: tuple[Words, ...]
    unused: tuple[Words, ...]


@cache
def _packing(tables: tuple[Table, ...]) -> _Packing:
    layouts = [[layout_of(t.packing(form)) for t in tables] for form in (_NARROW, _WIDE)]
    width_FT = np.array([[one.num_words for one in of_form] for of_form in layouts])
    parts_T = [
        np.array([(form, t, *part) for form, of_form in enumerate(layouts) for part in of_form[t].parts])
        for t in range(len(tables))
    ]
    return _Packing(
        head=1 + -(-len(tables) // 4),
        width_FT=width_FT,
        by_table=tuple(np.ascontiguousarray(width_FT[:, t]) for t in range(len(tables))),
        columns_T=np.array([t.width for t in tables]),
        parts=np.concatenate(parts_T),
        parts_T=tuple(parts_T),
        unused=tuple(np.array(one.unused_C) for one in layouts[_NARROW]),
    )


def encode(state: State) -> list[bytes]:
    """One blob per entity; an entity without rows becomes b""."""
    tables = list(state.rows.values())
    packing = _packing(tuple(rows.table for rows in tables))
    offsets_TE = np.stack([rows.offsets for rows in tables])
    counts_TE = np.diff(offsets_TE, axis=1)
    assert int(counts_TE.max(initial=0)) <= _ROWS_MAX
    columns = [rows.columns for rows in tables]
    form_E = np.zeros(len(state), np.int64)
    for some, unused, offsets in zip(columns, packing.unused, offsets_TE, strict=True):
        packed.mark_unfit(some, unused, offsets, form_E)
    at_TE, end_E = np.empty_like(counts_TE), np.empty(len(state), np.int64)
    num_words = packed.lay_out(form_E, offsets_TE, packing.width_FT, packing.head, at_TE, end_E)
    out = np.zeros(num_words, np.int64)
    packed.put_heads(form_E, offsets_TE, end_E, packing.head, _MAGIC, out)
    for t, some in enumerate(columns):
        packed.put(form_E, at_TE[t], offsets_TE[t], packing.parts_T[t], packing.by_table[t], some, *_sized(out))
    data, known = out.tobytes(), (counts_TE.sum(axis=0) > 0).tolist()
    ends = [0, *(end_E * 8).tolist()]
    return [data[a:b] if k else b"" for a, b, k in zip(ends[:-1], ends[1:], known, strict=True)]


def decode(tables: Sequence[Table], blobs: Sequence[bytes | memoryview]) -> State:
    """The inverse of `encode`; b"" is an unknown entity.

    Raises: CorruptData for a blob that this set of tables did not write.
    """
    packing, num = _packing(tuple(tables)), len(blobs)
    data = b"".join(blobs)
    if len(data) & 7:
        raise _corrupt(_WRONG[2])
    words, sizes = np.frombuffer(data, "<i8"), np.fromiter(map(len, blobs), np.int64, num)
    form_E, at_TE = np.empty(num, np.int64), np.empty((len(tables), num), np.int64)
    offsets_TE = np.zeros((len(tables), num + 1), np.int64)
    wrong = packed.scan(words, sizes, packing.head, _MAGIC, packing.width_FT, form_E, at_TE, offsets_TE)
    if wrong:
        raise _corrupt(_WRONG[wrong - 1])
    size_T = packing.columns_T * offsets_TE[:, -1]
    end_T = size_T.cumsum()
    begin_T = end_T - size_T
    out = np.zeros(end_T[-1], np.int64)
    packed.take(form_E, at_TE, offsets_TE, packing.parts, packing.width_FT, *_sized(words), begin_T, out)
    rows = {}
    for t, (table, begin, end) in enumerate(zip(tables, begin_T.tolist(), end_T.tolist(), strict=True)):
        rows[table.name] = Rows(table, offsets_TE[t], out[begin:end].reshape(table.width, -1).T)
    return State(rows)


def _sized(words: Words) -> tuple[Bytes, Bytes, Bytes, Words]:
    """The same memory as words of 1, 2, 4 and 8 bytes."""
    return words.view(np.uint8), words.view(np.uint16), words.view(np.uint32), words


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
