"""fold: the only code that turns events into feature state, online and offline.

The new rows of a batch are sorted once, then merged into the sorted state of all entities in one compiled pass:
inserted or combined, and cut to the declared size.

Shape legend: E entities, R state rows, N new rows, C columns.
"""

from __future__ import annotations

import numpy as np

from feature_store.columns import EventColumns, NewRows
from feature_store.compiled import reducer
from feature_store.state import Op, Rows, State, Words
from feature_store.view import Views

_WORD_BITS = 63
_OPS = (Op.ADD, Op.MAX, Op.MIN)  # by their numbers in `reducer.merged`


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
    columns = new.words.T
    order = _order([new.code, *columns[:num_keys]])
    offsets = np.zeros_like(state.offsets)
    out = np.empty((table.width, len(state.words) + len(order)), np.int64)
    keep, span = (np.array(bound or (), np.int64) for bound in (table.keep, table.span))
    ops = np.array([_OPS.index(op) for _, op in table.values], np.int64)
    num_rows = reducer.merged(
        state.offsets, state.columns, new.code[order], np.ascontiguousarray(columns[:, order]), num_keys, ops,
        keep, span, table.group_shift, offsets, out,
    )  # fmt: skip
    return Rows(table, offsets, out[:, :num_rows].T)


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
