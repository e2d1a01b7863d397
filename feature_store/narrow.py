"""Where the bytes of a packed row are: each column in as many as its table declares.

A column's code is its width: "u1" to "u8" bytes, or "2u1" and "2u2" for a word of two 31-bit counts of one or two bytes
each. A row's parts are laid out from the largest to the smallest and padded to 8 bytes, so that all are aligned.

Shape legend: C columns, P parts.
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
    "u3": ((2, 0), (1, 16)),
    "u4": ((4, 0),),
    "u5": ((4, 0), (1, 32)),
    "u6": ((4, 0), (2, 32)),
    "u7": ((4, 0), (2, 32), (1, 48)),
    "u8": ((8, 0),),
    "2u1": ((1, 0), (1, 32)),
    "2u2": ((2, 0), (2, 32)),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """num_words: of a row. parts: (column, bytes, place counted in its own size, shift). unused_C: the bits of a column
    that have to be zero.
    """

    num_words: int
    parts: tuple[tuple[int, int, int, int], ...]
    unused_C: tuple[int, ...]


@cache
def layout_of(codes: tuple[str, ...]) -> Layout:
    """The layout of columns with these codes."""
    wanted = [
        (-size, code[0] == "2", column, shift)
        for column, code in enumerate(codes)
        for size, shift in _PARTS[code]
    ]  # fmt: skip
    parts, at = [], 0
    for negative, _, column, shift in sorted(wanted):
        parts.append((column, -negative, at // -negative, shift))
        at -= negative
    unused_C = tuple(
        ~sum((1 << 8 * size) - 1 << shift for size, shift in _PARTS[code]) & ((1 << 63) - 1) for code in codes
    )
    return Layout(-(-at // 8), tuple(parts), unused_C)
