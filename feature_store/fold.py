"""fold: the only code that turns events into feature state, online and offline.

No Python loop runs per event: the new rows of a batch are sorted, found in the sorted state by one vectorised binary
search over all entities at once, combined or inserted, and cut to the declared size.

Shape legend: E entities, R state rows, N new rows, C columns, K key columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns, NewRows
from feature_store.state import Op, Rows, State, Words
from feature_store.view import Views

_PACKED_KEY_BITS = 44
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
    """Rows of the state and new rows (code [N], words [N, C]) as one: sorted, combined by key, cut to `keep`."""
    if not len(new.code):
        return state
    table, num_keys = state.table, len(state.table.key)
    code, words = _combined(state, new)
    at, end = _lower_bound(state, code, words[:, :num_keys])
    hit = at < end
    hit[hit] = (state.words[at[hit], :num_keys] == words[hit, :num_keys]).all(axis=1)
    old = state.words
    if hit.any():
        old = old.copy()
        for c, (_, op) in enumerate(table.values, num_keys):
            old[at[hit], c] = _UFUNC[op](old[at[hit], c], words[hit, c])
    inserted = ~hit
    target = at[inserted] + np.arange(int(inserted.sum()))
    out = np.empty((len(old) + len(target), table.width), np.int64)
    is_old = np.ones(len(out), np.bool_)
    is_old[target] = False
    out[target] = words[inserted]
    out[is_old] = old
    added = np.bincount(code[inserted], minlength=len(state.offsets) - 1)
    offsets = state.offsets + np.concatenate(([0], np.cumsum(added)))
    return _cut(Rows(table, offsets, out))


def _combined(state: Rows, new: NewRows) -> tuple[Words, Words]:
    """New rows sorted by (entity, key), rows with an equal key combined."""
    num_keys = len(state.table.key)
    order = _order(new, num_keys)
    code, words = new.code[order], new.words[order]
    first = np.ones(len(code), np.bool_)
    first[1:] = code[1:] != code[:-1]
    for c in range(num_keys):
        first[1:] |= words[1:, c] != words[:-1, c]
    starts = np.flatnonzero(first)
    if len(starts) == len(code):
        return code, words
    out = words[starts]
    for c, (_, op) in enumerate(state.table.values, num_keys):
        out[:, c] = _UFUNC[op].reduceat(words[:, c], starts)
    return code[starts], out


def _order(new: NewRows, num_keys: int) -> Words:
    """Order of new rows by (entity, key); rows with an equal key in any order, as their operations commute."""
    key = new.words[:, 0]
    if num_keys == 1 and int(key.max()) < 1 << _PACKED_KEY_BITS and int(new.code.max()) < 1 << (63 - _PACKED_KEY_BITS):
        return np.argsort((new.code << _PACKED_KEY_BITS) | key)  # one word to compare: several times faster
    return np.lexsort([*(new.words[:, c] for c in reversed(range(num_keys))), new.code])


def _lower_bound(state: Rows, code: Words, keys: Words) -> tuple[Words, Words]:
    """Per new row: index of the first state row of its entity with a key not less than its own; end of the entity."""
    low, end = state.offsets[code], state.offsets[code + 1]
    high = end.copy()
    todo = np.flatnonzero(low < high)
    while len(todo):
        middle = (low[todo] + high[todo]) // 2
        less = _less(state.words[middle], keys[todo])
        low[todo[less]] = middle[less] + 1
        high[todo[~less]] = middle[~less]
        todo = todo[low[todo] < high[todo]]
    return low, end


def _less(a: Words, b: Words) -> npt.NDArray[np.bool_]:
    """A < b, lexicographically over the columns of b."""
    less, equal = a[:, 0] < b[:, 0], a[:, 0] == b[:, 0]
    for c in range(1, b.shape[1]):
        less |= equal & (a[:, c] < b[:, c])
        equal &= a[:, c] == b[:, c]
    return np.asarray(less)


def _cut(rows: Rows) -> Rows:
    """Drop the smallest keys of every group that has more rows than it may keep."""
    keep = rows.table.keep
    if keep is None or not len(rows.words):
        return rows
    group, owner = rows.words[:, 0] >> rows.table.group_shift, rows.owner
    first = np.ones(len(group), np.bool_)
    first[1:] = (group[1:] != group[:-1]) | (owner[1:] != owner[:-1])
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(group)))
    excess = lengths - np.asarray(keep)[group[starts]]
    if not (excess > 0).any():
        return rows
    place = np.arange(len(group)) - np.repeat(starts, lengths)
    return rows.where(place >= np.repeat(excess, lengths))
