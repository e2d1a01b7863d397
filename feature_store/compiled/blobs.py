"""Rows to and from the bytes of blobs, all entities of a batch in one call.

parts [P, 6]: form, table, column, bytes, place in units of these bytes, shift. u1, u2, u4, i8: the same memory as words
of 1, 2, 4, 8 bytes.

Shape legend: E entities, T tables, R rows, C columns, F forms, P parts. columns [C, R] are C-contiguous int64, offsets
[E + 1] as in `state.Rows`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.compiled.how import compiled
from feature_store.narrow import Words

Bytes = npt.NDArray[np.unsignedinteger]


@compiled
def scan(
    words: Words, bytes_E: Words, head: int, magic: int, width_FT: Words, form_E: Words, at_TE: Words, offsets_TE: Words
) -> int:
    """Fill form [E], first word of each table's rows [T, E] and offsets [T, E + 1] of blobs that follow each other.

    Returns 0, 1 for a blob without our header, 2 for row counts that do not add up to its length, 3 for broken words.
    """
    num_tables, at = len(at_TE), 0
    for e in range(len(bytes_E)):
        if bytes_E[e] & 7:
            return 3
        num_words, form = bytes_E[e] >> 3, 0
        if num_words:
            if num_words < head:
                return 1
            form = words[at] >> 32 & 0xFFFF
            if form >= len(width_FT) or words[at] != (magic << 48 | form << 32 | num_words):
                return 1
        form_E[e] = form
        row_at = at + head
        for t in range(num_tables):
            count = words[at + 1 + (t >> 2)] >> 16 * (t & 3) & 0xFFFF if num_words else 0
            at_TE[t, e] = row_at
            offsets_TE[t, e + 1] = offsets_TE[t, e] + count
            row_at += count * width_FT[form, t]
        if num_words and row_at != at + num_words:
            return 2
        at += num_words
    return 0


@compiled
def take(
    form_E: Words, at_TE: Words, offsets_TE: Words, parts: Words, width_FT: Words, u1: Bytes, u2: Bytes, u4: Bytes,
    i8: Words, begin_T: Words, out: Words,
) -> None:  # fmt: skip
    """Unpack the rows of all tables into out, which is zero before: columns of table t follow each other from begin [T]
    on.
    """
    num_entities = len(form_E)
    for p in range(len(parts)):
        form, t, column, size, place, shift = parts[p]
        per_row = width_FT[form, t] * 8 // size
        first = begin_T[t] + column * offsets_TE[t, num_entities]
        for e in range(num_entities):
            if form_E[e] != form:
                continue
            at = at_TE[t, e] * 8 // size + place
            begin, end = first + offsets_TE[t, e], first + offsets_TE[t, e + 1]
            if size == 1:
                for r in range(begin, end):
                    out[r] |= np.int64(u1[at]) << shift
                    at += per_row
            elif size == 2:
                for r in range(begin, end):
                    out[r] |= np.int64(u2[at]) << shift
                    at += per_row
            elif size == 4:
                for r in range(begin, end):
                    out[r] |= np.int64(u4[at]) << shift
                    at += per_row
            else:
                for r in range(begin, end):
                    out[r] = i8[at]
                    at += per_row


@compiled
def mark_unfit(columns: Words, unused_C: Words, offsets: Words, form_E: Words) -> None:
    """Give form 1 to entities with a value that needs bits outside its column's."""
    bits = np.zeros(len(columns), np.int64)
    for c in range(len(columns)):
        for r in range(columns.shape[1]):
            bits[c] |= columns[c, r]
    for c in range(len(columns)):
        if bits[c] & unused_C[c]:
            for e in range(len(form_E)):
                for r in range(offsets[e], offsets[e + 1]):
                    if columns[c, r] & unused_C[c]:
                        form_E[e] = 1


@compiled
def lay_out(form_E: Words, offsets_TE: Words, width_FT: Words, head: int, at_TE: Words, end_E: Words) -> int:
    """Fill first word of each table's rows [T, E] and end [E] of blobs that follow each other; returns all words."""
    at = 0
    for e in range(len(form_E)):
        at += head
        for t in range(len(at_TE)):
            at_TE[t, e] = at
            at += (offsets_TE[t, e + 1] - offsets_TE[t, e]) * width_FT[form_E[e], t]
        end_E[e] = at
    return at


@compiled
def put_heads(form_E: Words, offsets_TE: Words, end_E: Words, head: int, magic: int, out: Words) -> None:
    """Write the first words of blobs."""
    start = 0
    for e in range(len(form_E)):
        out[start] = magic << 48 | form_E[e] << 32 | (end_E[e] - start)
        for i in range(1, head):
            out[start + i] = 0
        for t in range(len(offsets_TE)):
            out[start + 1 + (t >> 2)] |= (offsets_TE[t, e + 1] - offsets_TE[t, e]) << 16 * (t & 3)
        start = end_E[e]


@compiled
def put(
    form_E: Words,
    at_E: Words,
    offsets: Words,
    parts: Words,
    width_F: Words,
    columns: Words,
    u1: Bytes,
    u2: Bytes,
    u4: Bytes,
    i8: Words,
) -> None:
    """Pack the rows of one table, columns [C, R], into memory that is zero before."""
    for p in range(len(parts)):
        form, _, column, size, place, shift = parts[p]
        per_row = width_F[form] * 8 // size
        for e in range(len(form_E)):
            if form_E[e] != form:
                continue
            at = at_E[e] * 8 // size + place
            for r in range(offsets[e], offsets[e + 1]):
                if size == 1:
                    u1[at] = columns[column, r] >> shift
                elif size == 2:
                    u2[at] = columns[column, r] >> shift
                elif size == 4:
                    u4[at] = columns[column, r] >> shift
                else:
                    i8[at] = columns[column, r]
                at += per_row
