"""fold: the only code that turns events into feature state, online and offline.

No Python loop runs per event: the new rows of a batch are sorted, found in the sorted state by one vectorised search
over all entities at once, combined or inserted, and cut to the declared size.

Shape legend: E entities, R state rows, N new rows, C columns, K key columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.state import Op, Rows, State, Words
from feature_store.view import Views

_WORD_BITS = 63
_UFUNC = {Op.ADD: np.add, Op.MAX: np.maximum, Op.MIN: np.minimum}


def fold(views: Views, state: State, events: EventColumns) -> State:
    """The state of one kind of entity after a batch.

    `events.code(views.kind)` gives each event's entity, a row of `state`, -1 where the event does not concern one.
    State after any batching and any permutation of the same events is bit-equal (forget events aside: see
    `feature_store.forget`).
    """
    new = views.rows(events)
    return State({name: merge(rows, new[name]) if name in new else rows for name, rows in state.rows.items()})


def merge(state: Rows, new: NewRows) -> Rows:
    """Rows of the state and new rows (code [N], words [N, C]) as one: sorted, combined by key, cut to its bounds."""
    if not len(new.code):
        return state
    table, num_keys = state.table, len(state.table.key)
    code, columns = _combined(state, new)
    at, end = _lower_bound(state, code, columns[:num_keys])
    old = state.words.T
    hit = at < end
    found = at[hit]
    same = np.ones(len(found), np.bool_)
    for c in range(num_keys):
        same &= old[c, found] == columns[c, hit]
    hit[hit] = same
    inserted = np.flatnonzero(~hit)
    target = at[inserted] + np.arange(len(inserted))
    place = np.delete(np.arange(old.shape[1] + len(target)), target)
    out = np.empty((table.width, old.shape[1] + len(target)), np.int64)
    for c in range(table.width):
        out[c, place] = old[c]
        out[c, target] = columns[c, inserted]
    updated = place[found[same]]
    for c, (_, op) in enumerate(table.values, num_keys):
        out[c, updated] = _UFUNC[op](out[c, updated], columns[c, hit])
    offsets = state.offsets.copy()
    offsets[1:] += np.cumsum(np.bincount(code[inserted], minlength=len(offsets) - 1))
    return _cut(Rows(table, offsets, out.T))


def _combined(state: Rows, new: NewRows) -> tuple[Words, Words]:
    """New rows sorted by (entity, key), rows with an equal key combined: entity [N], columns [C, N]."""
    num_keys = len(state.table.key)
    columns = new.words.T
    order = _order([new.code, *columns[:num_keys]])
    code, columns = new.code[order], columns[:, order]
    first = np.ones(len(code), np.bool_)
    first[1:] = code[1:] != code[:-1]
    for c in range(num_keys):
        first[1:] |= columns[c, 1:] != columns[c, :-1]
    starts = np.flatnonzero(first)
    if len(starts) == len(code):
        return code, columns
    out = columns[:, starts]
    for c, (_, op) in enumerate(state.table.values, num_keys):
        out[c] = _UFUNC[op].reduceat(columns[c], starts)
    return code[starts], out


def _order(keys: list[Words]) -> Words:
    """Order by several columns, the first one first; equal rows in any order, as their operations commute.

    As many columns as fit are packed into one word, which is several times faster to sort; what is equal in them is
    sorted by the others apart.
    """
    packed, bits_left, rest = np.zeros(len(keys[0]), np.int64), _WORD_BITS, list(keys)
    while rest:
        low = int(rest[0].min())
        bits = (int(rest[0].max()) - low).bit_length()
        if bits > bits_left:
            break
        packed = (packed << bits) | (rest[0] - low)
        bits_left -= bits
        del rest[0]
    order = np.argsort(packed)
    if not rest:
        return order
    ranked = packed[order]
    equal = np.zeros(len(order) + 1, np.bool_)
    equal[1:-1] = ranked[1:] == ranked[:-1]
    tied = np.flatnonzero(equal[1:] | equal[:-1])
    if len(tied):
        among = order[tied]
        order[tied] = among[np.lexsort([*(k[among] for k in reversed(rest)), packed[among]])]
    return order


def _lower_bound(state: Rows, code: Words, keys: Words) -> tuple[Words, Words]:
    """Per new row: index of the first state row of its entity with a key not less than its own; end of the entity.

    keys [K, N].
    """
    low, end = state.offsets[code], state.offsets[code + 1]
    if len(keys) == 1 and len(state.words):
        bits = max(int(keys[0].max()), int(state.words[:, 0].max())).bit_length()
        if bits + len(state.offsets).bit_length() <= _WORD_BITS:
            return np.searchsorted((state.owner << bits) | state.words[:, 0], (code << bits) | keys[0]), end
    columns = state.words.T[: len(keys)]
    high = end.copy()
    todo = np.flatnonzero(low < high)
    while len(todo):
        middle = (low[todo] + high[todo]) >> 1
        less = _less(columns, middle, keys, todo)
        low[todo[less]] = middle[less] + 1
        high[todo[~less]] = middle[~less]
        todo = todo[low[todo] < high[todo]]
    return low, end


def _less(a: Words, at: Words, b: Words, bt: Words) -> npt.NDArray[np.bool_]:
    """a[:, at] < b[:, bt], lexicographically over their columns."""
    less = np.zeros(len(at), np.bool_)
    equal = np.arange(len(at))
    for c in range(len(a)):
        x, y = a[c, at[equal]], b[c, bt[equal]]
        less[equal] = x < y
        equal = equal[x == y]
        if not len(equal):
            break
    return less


def _cut(rows: Rows) -> Rows:
    """Drop what is beyond the bounds of each group: the smallest keys of one of too many rows, and those far behind."""
    keep, span = rows.table.keep, rows.table.span
    if (keep is None and span is None) or not len(rows.words):
        return rows
    key, owner = rows.words[:, 0], rows.owner
    group = key >> rows.table.group_shift
    first = np.ones(len(group), np.bool_)
    first[1:] = (group[1:] != group[:-1]) | (owner[1:] != owner[:-1])
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(group))
    kept = np.ones(len(group), np.bool_)
    if span is not None:
        floor = key[ends - 1] - np.asarray(span)[group[starts]]
        kept &= key > np.repeat(floor, ends - starts)
    if keep is not None:
        excess = ends - starts - np.asarray(keep)[group[starts]]
        if (excess > 0).any():
            kept &= np.arange(len(group)) >= np.repeat(starts + excess, ends - starts)
    return rows if kept.all() else rows.where(kept)
