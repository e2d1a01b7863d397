"""The reducer: new rows into sorted state, all entities of a batch in one pass.

Shape legend: E entities, R state rows, N new rows, C columns. columns [C, R] are C-contiguous int64, offsets [E + 1] as
in `state.Rows`.
"""

from __future__ import annotations

from feature_store.compiled.how import compiled
from feature_store.narrow import Words


@compiled
def _compare(a: Words, i: int, b: Words, j: int, num_keys: int) -> int:
    for c in range(num_keys):
        if a[c, i] != b[c, j]:
            return -1 if a[c, i] < b[c, j] else 1
    return 0


@compiled
def _cut(rows: Words, start: int, end: int, keep: Words, span: Words, shift: int) -> int:
    """Drop the smallest keys of each group of one entity's rows, in place; returns the new end. [] = no bound."""
    kept, first = start, start
    while first < end:
        group, after = rows[0, first] >> shift, first + 1
        while after < end and rows[0, after] >> shift == group:
            after += 1
        if len(span):
            floor = rows[0, after - 1] - span[group]
            while first < after and rows[0, first] <= floor:
                first += 1
        if len(keep):
            first = max(first, after - keep[group])
        if kept == first:
            kept = after
        else:
            for r in range(first, after):
                for c in range(len(rows)):
                    rows[c, kept] = rows[c, r]
                kept += 1
        first = after
    return kept


@compiled
def merged(
    offsets: Words, old: Words, code: Words, new: Words, num_keys: int, ops: Words, keep: Words, span: Words,
    shift: int, out_offsets: Words, out: Words,
) -> int:  # fmt: skip
    """Merge new rows [C, N], sorted by (code [N] = entity, key), into old rows; returns how many rows `out` has.

    Rows with an equal key become one: each value column by its operation, 0 add, 1 max, 2 min.
    """
    num_columns, k, j = len(out), 0, 0
    for e in range(len(offsets) - 1):
        i, end, start = offsets[e], offsets[e + 1], k
        if j == len(code) or code[j] != e:
            for c in range(num_columns):
                for r in range(end - i):
                    out[c, k + r] = old[c, i + r]
            k += end - i
            out_offsets[e + 1] = k
            continue
        while True:
            is_new = j < len(code) and code[j] == e
            if i < end and (not is_new or _compare(old, i, new, j, num_keys) <= 0):
                for c in range(num_columns):
                    out[c, k] = old[c, i]
                i += 1
            elif is_new:
                for c in range(num_columns):
                    out[c, k] = new[c, j]
                j += 1
            else:
                break
            while j < len(code) and code[j] == e and _compare(out, k, new, j, num_keys) == 0:
                for c in range(num_keys, num_columns):
                    if ops[c - num_keys] == 0:
                        out[c, k] += new[c, j]
                    elif ops[c - num_keys] == 1:
                        out[c, k] = max(out[c, k], new[c, j])
                    else:
                        out[c, k] = min(out[c, k], new[c, j])
                j += 1
            k += 1
        if len(keep) or len(span):
            k = _cut(out, start, k, keep, span, shift)
        out_offsets[e + 1] = k
    return k
