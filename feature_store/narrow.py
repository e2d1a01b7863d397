"""Rows of int64 words in fewer bytes: each column in as many as its table declares, all rows of a batch at once.

A column's code is its width: "u1" to "u8" bytes, or "2u1" and "2u2" for a word of two 31-bit counts of one or two bytes
each. A row's parts are laid out from the largest to the smallest and padded to 8 bytes, so that all are aligned.

Shape legend: R rows, C columns, W packed words of 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int64]

# (bytes, shift) of the parts of a column
_PARTS = {
    "u1": ((1, 0),),
    "u2": ((2, 0),),
    "u4": ((4, 0),),
    "u5": ((4, 0), (1, 32)),
    "u6": ((4, 0), (2, 32)),
    "u7": ((4, 0), (2, 32), (1, 48)),
    "u8": ((8, 0),),
    "2u1": ((1, 0), (1, 32)),
    "2u2": ((2, 0), (2, 32)),
}
_DTYPE = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<i8"}


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of one column: at `place`, counted in its own size, of each row."""

    column: int
    size: int
    place: int
    shift: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a row are. lanes: (size, first place, first column, end column) of words of two counts."""

    num_words: int
    sizes: frozenset[int]
    parts: tuple[_Part, ...]
    lanes: tuple[int, int, int, int] | None
    unused: tuple[int, ...]  # by column: the bits that have to be zero


@cache
def layout_of(codes: tuple[str, ...]) -> Layout:
    """The layout of columns with these codes. Words of two counts are of one size and side by side."""
    wanted = [
        (-size, code[0] == "2", column, shift)
        for column, code in enumerate(codes)
        for size, shift in _PARTS[code]
    ]  # fmt: skip
    parts, at, lanes = [], 0, None
    for negative, is_lane, column, shift in sorted(wanted):
        size = -negative
        if not is_lane:
            parts.append(_Part(column, size, at // size, shift))
        elif lanes is None:
            lanes = (size, at // size, column, column + 1)
        else:
            assert lanes[0] == size
            lanes = (*lanes[:3], column + 1)
        at += size
    unused = tuple(
        ~sum((1 << 8 * size) - 1 << shift for size, shift in _PARTS[code]) & ((1 << 63) - 1) for code in codes
    )
    return Layout(-(-at // 8), frozenset(-w[0] for w in wanted), tuple(parts), lanes, unused)


def pack(codes: tuple[str, ...], words: Words) -> tuple[Words, npt.NDArray[np.bool_] | None]:
    """Rows [R, C] packed [R, W], and which of them fit [R]; None = all. All words are non-negative."""
    layout = layout_of(codes)
    packed = np.zeros((len(words), layout.num_words), np.int64)
    fits = None
    for column, unused in enumerate(layout.unused):
        if int(np.bitwise_or.reduce(words[:, column])) & unused:
            fits = np.ones(len(words), np.bool_) if fits is None else fits
            fits &= (words[:, column] & unused) == 0
    views = {size: packed.view(_DTYPE[size]) for size in layout.sizes}
    for p in layout.parts:
        views[p.size][:, p.place] = words[:, p.column] >> p.shift if p.shift else words[:, p.column]
    if layout.lanes is not None:
        size, place, first, end = layout.lanes
        counts = np.ascontiguousarray(words[:, first:end]).view(np.int32)
        views[size][:, place : place + 2 * (end - first)] = counts
    return packed, fits


def unpack(codes: tuple[str, ...], packed: Words) -> Words:
    """The inverse of `pack` for rows that fit: [R, C], each column contiguous."""
    layout = layout_of(codes)
    columns = np.empty((len(codes), len(packed)), np.int64)
    views = {size: packed.view(_DTYPE[size]) for size in layout.sizes}
    for p in layout.parts:
        part = views[p.size][:, p.place]
        if p.shift:
            columns[p.column] |= part.astype(np.int64) << p.shift
        else:
            columns[p.column] = part
    if layout.lanes is not None:
        size, place, first, end = layout.lanes
        counts = views[size][:, place : place + 2 * (end - first)].astype(np.int32)
        columns[first:end] = counts.view(np.int64).T
    return columns.T


def words_of(codes: tuple[str, ...]) -> int:
    """W."""
    return layout_of(codes).num_words
