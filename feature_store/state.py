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
from functools import cached_property

import numpy as np
import numpy.typing as npt

from feature_store.narrow import Words, pack, unpack, words_of
from recsys.core import CorruptData

__all__ = ["FORMAT", "Op", "Rows", "State", "Table", "Words", "decode", "encode", "spread"]

FORMAT = 2  # raise it when blobs change in another way than by their tables' declarations
# A blob's first word: these 16 bits, 16 of its form, its length in words; then its row counts as 16-bit lanes.
_MAGIC = 0x0D12
_NARROW, _WIDE = 0, 1
_ROWS_MAX = (1 << 16) - 1


class Op(Enum):
    """How the values of two rows with the same key become one."""

    ADD = "add"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One declared table.

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

    def of(self, entities: Words) -> Rows:
        """The rows of some entities, in that order."""
        counts = self.counts[entities]
        at = spread(self.offsets[entities], counts)
        return Rows(self.table, np.append(0, np.cumsum(counts)), self.words.T[:, at].T)


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
    """One blob per entity; an entity without rows becomes b""."""
    packed, is_wide = [], np.zeros(len(state), np.bool_)
    for rows in state.rows.values():
        narrow, fits = pack(rows.table.packing(_NARROW), rows.words)
        packed.append(narrow)
        if fits is not None:
            is_wide[rows.owner[~fits]] = True
    if not is_wide.any():
        return _assembled(state, packed, _NARROW)
    out = [b""] * len(state)
    for form, which in ((_NARROW, np.flatnonzero(~is_wide)), (_WIDE, np.flatnonzero(is_wide))):
        part = State({name: rows.of(which) for name, rows in state.rows.items()})
        words = [pack(r.table.packing(form), r.words)[0] for r in part.rows.values()]
        for e, blob in zip(which.tolist(), _assembled(part, words, form), strict=True):
            out[e] = blob
    return out


def _assembled(state: State, packed: Sequence[Words], form: int) -> list[bytes]:
    """Blobs of entities that are all packed in one form; packed: per table [R, W]."""
    tables = list(state.rows.values())
    counts_ET = np.stack([r.counts for r in tables], axis=1)
    assert int(counts_ET.max(initial=0)) <= _ROWS_MAX
    head = _head(len(tables))
    sizes_ET = counts_ET * np.array([p.shape[1] for p in packed])
    total_E = head + sizes_ET.sum(axis=1)
    start_E = np.cumsum(total_E) - total_E
    out = np.empty(int(total_E.sum()), np.int64)
    out[start_E] = (_MAGIC << 48) | (form << 32) | total_E
    lanes = np.zeros((len(counts_ET), (head - 1) * 4), np.uint16)
    lanes[:, : len(tables)] = counts_ET
    out[start_E[:, None] + np.arange(1, head)] = lanes.view(np.int64)
    at_E = start_E + head
    for i, words in enumerate(packed):
        out[spread(at_E, sizes_ET[:, i])] = words.reshape(-1)
        at_E = at_E + sizes_ET[:, i]
    data = out.astype("<i8", copy=False).tobytes()
    known = np.asarray(counts_ET.any(axis=1))
    ends = ((start_E + total_E) * 8).tolist()
    return [data[a:b] if k else b"" for a, b, k in zip((start_E * 8).tolist(), ends, known.tolist(), strict=True)]


def decode(tables: Sequence[Table], blobs: Sequence[bytes | memoryview]) -> State:
    """The inverse of `encode`; b"" is an unknown entity.

    Raises: CorruptData for a blob that this set of tables did not write.
    """
    if len(blobs) == 1 and blobs[0]:
        return _decoded_one(tables, blobs[0])
    sizes = np.fromiter(map(len, blobs), np.int64, len(blobs))
    if (sizes & 7).any():
        raise _corrupt("a blob of broken words")
    words, total_E = np.frombuffer(b"".join(blobs), "<i8"), sizes >> 3
    head = _head(len(tables))
    known = np.flatnonzero(total_E)
    start_E = (np.cumsum(total_E) - total_E)[known]
    first = words[start_E]
    form = first >> 32 & 0xFFFF
    if (total_E[known] < head).any() or (first & ~(1 << 32) != (_MAGIC << 48) | total_E[known]).any():
        raise _corrupt("a blob without our header")
    if not form.any():
        return _decoded(tables, words, _NARROW, len(blobs), known, start_E, total_E[known])
    parts = [
        _decoded(tables, words, f, len(blobs), known[form == f], start_E[form == f], total_E[known[form == f]])
        for f in (_NARROW, _WIDE)
    ]
    return State({t.name: _beside(parts[0][t.name], parts[1][t.name]) for t in tables})


def _decoded_one(tables: Sequence[Table], blob: bytes | memoryview) -> State:
    """`decode` of one known entity: a request reads one user, and numbers are quicker than arrays of one number."""
    head = _head(len(tables))
    if len(blob) % 8 or len(blob) < 8 * head:
        raise _corrupt("a blob of broken words")
    words = np.frombuffer(blob, "<i8")
    first = int(words[0])
    form = first >> 32 & 0xFFFF
    if form not in (_NARROW, _WIDE) or first != (_MAGIC << 48) | (form << 32) | len(words):
        raise _corrupt("a blob without our header")
    at, rows = head, {}
    for table, count in zip(tables, words[1:head].view(np.uint16).tolist(), strict=False):
        codes = table.packing(form)
        width = words_of(codes)
        end = at + count * width
        if end > len(words):
            raise _corrupt("row counts that do not add up to the blob's length")
        taken = words[at:end].reshape(-1, width)
        rows[table.name] = Rows(table, np.array((0, count), np.int64), unpack(codes, taken))
        at = end
    if at != len(words):
        raise _corrupt("row counts that do not add up to the blob's length")
    return State(rows)


def _decoded(
    tables: Sequence[Table], words: Words, form: int, num_entities: int, known: Words, start_E: Words, total_E: Words
) -> State:
    """State of `num_entities`, of which `known` have blobs of one form in `words`, from start_E on."""
    head = _head(len(tables))
    lanes = words[start_E[:, None] + np.arange(1, head)].view(np.uint16)
    counts_ET = np.zeros((num_entities, len(tables)), np.int64)
    counts_ET[known] = lanes[:, : len(tables)]
    packing = [t.packing(form) for t in tables]
    sizes_ET = counts_ET * np.array([words_of(codes) for codes in packing])
    if (sizes_ET.sum(axis=1)[known] + head != total_E).any():
        raise _corrupt("row counts that do not add up to the blob's length")
    at_E = np.zeros(num_entities, np.int64)
    at_E[known] = start_E + head
    offsets_TE = np.zeros((len(tables), num_entities + 1), np.int64)
    np.cumsum(counts_ET.T, axis=1, out=offsets_TE[:, 1:])
    rows = {}
    for i, (table, codes) in enumerate(zip(tables, packing, strict=True)):
        taken = words[spread(at_E, sizes_ET[:, i])].reshape(-1, words_of(codes))
        rows[table.name] = Rows(table, offsets_TE[i], unpack(codes, taken))
        at_E = at_E + sizes_ET[:, i]
    return State(rows)


def _beside(one: Rows, other: Rows) -> Rows:
    """Rows of the same entities, each of which has rows in one of them at most."""
    order = np.argsort(np.concatenate([one.owner, other.owner]), kind="stable")
    words = np.concatenate([one.words.T, other.words.T], axis=1)[:, order].T
    return Rows(one.table, one.offsets + other.offsets, words)


def _head(num_tables: int) -> int:
    """Words before the rows."""
    return 1 + -(-num_tables // 4)


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
