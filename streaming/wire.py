"""Actions, price and stock changes decoded by column: the protobuf wire format of N messages, all messages at once.

Only what is plainly one of them and valid is taken; every other message is left to `streaming.codec`, which reads it by
itself and says what is wrong. So this reader may be strict: repeated or unknown fields, unusual encodings and other
bodies are simply not its business.

Source: https://protobuf.dev/programming-guides/encoding/. Shape legend: N messages, M messages taken, B bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from feature_store.state import Words, spread
from recsys.core import EventBatch, EventKind, EventType
from recsys.core.ids import ID_BYTES_MAX

_VARINT, _BYTES, _FIXED32 = 0, 2, 5
_VARINT_BYTES_MAX = 9  # a tenth byte means a negative number or an unusual encoding
_ABSENT = -1
# Field numbers of Event and Action in event.proto.
_EVENT_ID, _TIME, _KNOWN_AT, _STRESS, _ACTION = 1, 2, 3, 4, 10
_EVENT = {_EVENT_ID: _BYTES, _TIME: _VARINT, _KNOWN_AT: _VARINT, _STRESS: _VARINT, _ACTION: _BYTES}
_TYPE, _USER, _ITEM, _SESSION, _REQUEST, _POSITION, _PROPENSITY, _PRICE, _QUANTITY = range(1, 10)
_BODY = {
    _TYPE: _VARINT, _USER: _BYTES, _ITEM: _BYTES, _SESSION: _BYTES, _REQUEST: _BYTES, _POSITION: _VARINT,
    _PROPENSITY: _FIXED32, _PRICE: _VARINT, _QUANTITY: _VARINT,
}  # fmt: skip
_PRICE_CHANGE, _STOCK_CHANGE = 11, 12
_EVENT_OF_CHANGE = {f: k for f, k in _EVENT.items() if f != _ACTION} | {_PRICE_CHANGE: _BYTES, _STOCK_CHANGE: _BYTES}
_CHANGED_ITEM, _CHANGED_TO = 1, 2  # of PriceChange and StockChange alike
_CHANGE = {_CHANGED_ITEM: _BYTES, _CHANGED_TO: _VARINT}
_INT32_MAX = (1 << 31) - 1

TIME_US_MAX = 4_102_444_800_000_000  # 2100-01-01: later is a unit mistaken (nanoseconds), not a date
TEXT_BYTES_MAX = 4 << 10
AMOUNT_MAX = 1 << 40  # of a price in minor units, or of a stock: millions of them are summed in 64 bits

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


class _Fields:
    """Fields of N messages. value[f] [N]: a number, or where the bytes begin; size[f] [N]: bytes, -1 = not there."""

    def __init__(self, data: Bytes, start: Words, end: Words, kinds: Mapping[int, int]) -> None:
        """Read messages data[start:end] [N]; `ok` [N] tells those understood to their end."""
        n = len(start)
        self.ok = np.ones(n, np.bool_)
        self.value = {f: np.zeros(n, np.int64) for f in kinds}
        self.size = {f: np.full(n, _ABSENT, np.int64) for f in kinds}
        kind_of = np.full(256, _ABSENT)
        for field, kind in kinds.items():
            kind_of[field << 3 | kind] = kind  # tags of one byte: fields up to 15
        at, rows = start.copy(), np.flatnonzero(start < end)
        while len(rows):
            tag = data[at[rows]]
            found = kind_of[tag]
            value, after = _varint(data, at[rows] + 1, found)
            size = np.where(found == _BYTES, value, 0)
            # A length is compared before it is added: a huge one would wrap around.
            good = (found != _ABSENT) & (after > 0) & (value >= 0) & (size <= end[rows] - after)
            stop = after + np.where(good, size, 0)
            for t in np.unique(tag[good]).tolist():
                mine = good & (tag == t)
                self._put(t >> 3, rows[mine], value[mine], after[mine], kinds[t >> 3])
            self.ok[rows[~good]] = False
            at[rows] = stop
            rows = rows[good & (stop < end[rows])]

    def _put(self, field: int, rows: Words, value: Words, after: Words, kind: int) -> None:
        self.ok[rows[self.size[field][rows] != _ABSENT]] = False  # set twice
        self.value[field][rows] = after if kind == _BYTES else value
        self.size[field][rows] = value if kind == _BYTES else 0


def decode_actions(values: Sequence[bytes]) -> tuple[EventBatch, Words]:
    """The plainly valid actions among N values of `events`, and their rows [M], ascending.

    None of them where a string is no UTF-8: then all are left to the codec, which finds the one.
    """
    data, start, end = _joined(values)
    event = _Fields(data, start, end, _EVENT)
    begin, length = event.value[_ACTION], event.size[_ACTION]
    body = _Fields(data, begin, begin + np.maximum(length, 0), _BODY)
    propensity = body.value[_PROPENSITY].astype(np.uint32).view(np.float32)
    ok = event.ok & body.ok & (length >= 0) & _valid(event, body, propensity)
    rows = np.flatnonzero(ok)
    try:
        return _batch(data, rows, event, body, propensity), rows
    except pa.ArrowInvalid:
        return EventBatch.empty(), rows[:0]


def decode_changes(values: Sequence[bytes]) -> tuple[EventBatch, Words]:
    """The plainly valid price and stock changes among N values of `catalog`, and their rows [M], as for actions."""
    data, start, end = _joined(values)
    event = _Fields(data, start, end, _EVENT_OF_CHANGE)
    priced, stocked = event.size[_PRICE_CHANGE] >= 0, event.size[_STOCK_CHANGE] >= 0
    begin = np.where(priced, event.value[_PRICE_CHANGE], event.value[_STOCK_CHANGE])
    length = np.where(priced, event.size[_PRICE_CHANGE], event.size[_STOCK_CHANGE])
    body = _Fields(data, begin, begin + np.maximum(length, 0), _CHANGE)
    ok = event.ok & body.ok & (priced != stocked) & _timed(event) & (body.value[_CHANGED_TO] <= AMOUNT_MAX)
    for size in (event.size[_EVENT_ID], body.size[_CHANGED_ITEM]):
        ok &= (size > 0) & (size <= ID_BYTES_MAX)
    rows = np.flatnonzero(ok)
    time_us, known_us = event.value[_TIME][rows], event.value[_KNOWN_AT][rows]
    priced, value = priced[rows], body.value[_CHANGED_TO][rows]
    try:
        columns = {
            "event_id": _strings(data, event, _EVENT_ID, rows),
            "kind": np.where(priced, int(EventKind.PRICE), int(EventKind.STOCK)).astype(np.int8),
            "event_type": np.zeros(len(rows), np.int8),
            "event_time": time_us,
            "known_at": np.where(known_us == 0, time_us, known_us),
            "item_id": _strings(data, body, _CHANGED_ITEM, rows),
            "price": pa.array(value, mask=~priced),
            "stock": pa.array(value, mask=priced),
            "stress": event.value[_STRESS][rows] != 0,
        }
    except pa.ArrowInvalid:
        return EventBatch.empty(), rows[:0]
    arrays = {n: c if isinstance(c, pa.Array) else pa.array(c) for n, c in columns.items()}
    return EventBatch.from_table(pa.table(arrays)), rows


def _joined(values: Sequence[bytes]) -> tuple[Bytes, Words, Words]:
    """All values in one array, some bytes beyond the last, and where each begins and ends [N]."""
    sizes = np.fromiter(map(len, values), np.int64, len(values))
    end = np.cumsum(sizes)
    return np.frombuffer(b"".join([*values, bytes(_VARINT_BYTES_MAX + 1)]), np.uint8), end - sizes, end


def _timed(event: _Fields) -> Mask:
    """The rules of `streaming.codec` for times [N]."""
    time_us, known_us = event.value[_TIME], event.value[_KNOWN_AT]
    ok = (time_us > 0) & (time_us < TIME_US_MAX)
    return np.asarray(ok & ((known_us == 0) | ((known_us >= time_us) & (known_us < TIME_US_MAX))))


def _valid(event: _Fields, body: _Fields, propensity: npt.NDArray[np.float32]) -> Mask:
    """The rules of `streaming.codec` for actions [N]."""
    ok = _timed(event)
    for size in (event.size[_EVENT_ID], body.size[_USER], body.size[_ITEM]):
        ok &= (size > 0) & (size <= ID_BYTES_MAX)
    for size in (body.size[_SESSION], body.size[_REQUEST]):
        ok &= size <= TEXT_BYTES_MAX
    ok &= (body.value[_TYPE] >= 1) & (body.value[_TYPE] <= EventType.RETURN)
    ok &= (body.size[_QUANTITY] == _ABSENT) | ((body.value[_QUANTITY] >= 1) & (body.value[_QUANTITY] <= _INT32_MAX))
    ok &= body.value[_PRICE] <= AMOUNT_MAX
    ok &= (body.value[_POSITION] <= _INT32_MAX) & (propensity >= 0) & (propensity <= 1)
    return np.asarray(ok)


def _batch(data: Bytes, rows: Words, event: _Fields, body: _Fields, propensity: npt.NDArray[np.float32]) -> EventBatch:
    """Rows [M] as a batch. Raises: pa.ArrowInvalid where a string is no UTF-8."""

    def number(fields: _Fields, field: int, *, null_zero: bool = False) -> pa.Array:
        value = fields.value[field][rows]
        return pa.array(value, mask=value == 0 if null_zero else fields.size[field][rows] == _ABSENT)

    time_us, known_us = event.value[_TIME][rows], event.value[_KNOWN_AT][rows]
    shown = propensity[rows]
    columns = {
        "event_id": _strings(data, event, _EVENT_ID, rows),
        "kind": np.full(len(rows), int(EventKind.ACTION), np.int8),
        "event_type": body.value[_TYPE][rows].astype(np.int8),
        "event_time": time_us,
        "known_at": np.where(known_us == 0, time_us, known_us),
        "user_id": _strings(data, body, _USER, rows),
        "item_id": _strings(data, body, _ITEM, rows),
        "session_id": _strings(data, body, _SESSION, rows),
        "request_id": _strings(data, body, _REQUEST, rows),
        "position": number(body, _POSITION, null_zero=True).cast(pa.int32()),
        "propensity": pa.array(shown, mask=shown == 0),
        "price": number(body, _PRICE),
        "quantity": number(body, _QUANTITY).cast(pa.int32()),
        "stress": event.value[_STRESS][rows] != 0,
    }
    arrays = {n: c if isinstance(c, pa.Array) else pa.array(c) for n, c in columns.items()}
    return EventBatch.from_table(pa.table(arrays))


def _strings(data: Bytes, fields: _Fields, field: int, rows: Words) -> pa.Array:
    """A string column [M], null where absent or empty. Raises: pa.ArrowInvalid for bytes that are no UTF-8."""
    size = np.maximum(fields.size[field][rows], 0)
    start = fields.value[field][rows]
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(size, out=offsets[1:])
    content = data[spread(start, size)]
    validity = pa.array(size > 0).buffers()[1]
    column = pa.Array.from_buffers(
        pa.string(), len(rows), [validity, pa.py_buffer(offsets.tobytes()), pa.py_buffer(content.tobytes())]
    )
    column.validate(full=True)
    return column


def _varint(data: Bytes, at: Words, kind: npt.NDArray[np.int64]) -> tuple[Words, Words]:
    """The number after each tag [N] and the place after it; place -1 for one that does not end. Fixed32 likewise."""
    value = np.zeros(len(at), np.uint64)
    after = np.full(len(at), -1, np.int64)
    fixed = np.flatnonzero(kind == _FIXED32)
    rows = np.flatnonzero((kind == _VARINT) | (kind == _BYTES))
    last = len(data) - 1
    for i in range(4):
        value[fixed] |= data[np.minimum(at[fixed] + i, last)].astype(np.uint64) << np.uint64(8 * i)
    after[fixed] = at[fixed] + 4
    for i in range(_VARINT_BYTES_MAX):
        if not len(rows):
            break
        byte = data[np.minimum(at[rows] + i, last)]
        value[rows] |= (byte & 127).astype(np.uint64) << np.uint64(7 * i)
        done = byte < 128
        after[rows[done]] = at[rows[done]] + i + 1
        rows = rows[~done]
    return value.view(np.int64), after
