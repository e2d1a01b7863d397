"""Accepted events on their way from the user stage to the item stage: columns of many in a record, and back.

A bucket of items keeps for each partition that the user stage reads a mark: the offset below which it has every row.
Rows below it are skipped, so a record may come twice, or cut otherwise. But a row that is lost is lost for good once
the mark has passed it. Hence two rules for whoever sends records of one source to one bucket:

- a record follows only when the one before it is durable (a step's first records go together, then, flushed, the
  second ones, and a step follows only upon the commit of the one before). An idempotent producer keeps the order of
  what arrives, but when a record times out it may well deliver the next;
- rows of one source record are never parted.

Shape legend: N events, R rows of a record, I items of a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from double11.v1.item_pb2 import ItemUpdates, ItemUpdatesSource
from google.protobuf.message import DecodeError

from feature_store.columns import EventColumns
from feature_store.state import Words
from recsys.core import EventKind, keys
from recsys.core.murmur2 import partitions_of

Source = tuple[str, int]
RECORD_BYTES_MAX = 900 << 10
_ROW_BYTES = 14 * 8  # at most, beside the item's id
_OPTIONAL = {
    "price": "price_minor",
    "quantity": "quantity",
    "stock": "stock_units",
    "listed": "listed",
    "category": "category_key",
    "brand": "brand_key",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRows:
    """Where N accepted events come from: source [N] = index into `sources`, offset [N], stress [N]."""

    sources: Sequence[Source]
    source: Words
    offset: Words
    stress: npt.NDArray[np.bool_]


def encode_updates(
    namespace: str, events: EventColumns, rows: SourceRows, num_partitions: int, *, bytes_max: int = RECORD_BYTES_MAX
) -> Iterator[list[tuple[int, bytes]]]:
    """Rounds of (partition, record) for N accepted events; each round to be durable before the next is sent."""
    bucket = np.append(partitions_of([i.encode() for i in events.item_ids], num_partitions), -1)[events.item_code]
    chosen = np.flatnonzero(bucket >= 0)
    order = chosen[np.lexsort((rows.offset[chosen], rows.source[chosen], bucket[chosen]))]
    id_bytes = np.array([len(i.encode()) for i in events.item_ids] or [0], np.int64)
    found, first = np.unique(bucket[order], return_index=True)
    records: list[tuple[int, list[bytes]]] = []
    for partition, at in zip(found.tolist(), np.split(order, first[1:]) if len(order) else (), strict=True):
        parts = _parts(at, rows, events, id_bytes, bytes_max)
        records.append((partition, [_encode(namespace, events, rows, part) for part in parts]))
    for i in range(max((len(values) for _, values in records), default=0)):
        yield [(partition, values[i]) for partition, values in records if i < len(values)]


def _parts(at: Words, rows: SourceRows, events: EventColumns, id_bytes: Words, bytes_max: int) -> list[Words]:
    """Rows of one bucket cut into records, between source records."""
    sizes = np.cumsum(_ROW_BYTES + id_bytes[events.item_code[at]])
    if sizes[-1] <= bytes_max:
        return [at]
    begins = np.append(
        True, (np.diff(rows.source[at]) != 0) | (np.diff(rows.offset[at]) != 0)
    )  # rows that begin a source record
    starts, parts, start = np.flatnonzero(begins), [], 0
    while start < len(at):
        before = int(sizes[start - 1]) if start else 0
        fits = int(np.searchsorted(sizes, before + bytes_max, side="right"))
        end = int(starts[np.searchsorted(starts, fits, side="right") - 1]) if fits < len(at) else len(at)
        if end <= start:  # one source record by itself
            later = starts[starts > start]
            end = int(later[0]) if len(later) else len(at)
        parts.append(at[start:end])
        start = end
    return parts


def _encode(namespace: str, events: EventColumns, rows: SourceRows, at: Words) -> bytes:
    items, item = np.unique(events.item_code[at], return_inverse=True)
    source, number = np.unique(rows.source[at], return_counts=True)
    stress = rows.stress[at]
    optional = {
        field: _words(column) for name, field in _OPTIONAL.items() if ((column := getattr(events, name)[at]) >= 0).any()
    }
    return ItemUpdates(
        namespace=namespace,
        sources=[
            ItemUpdatesSource(topic=rows.sources[s][0], partition=rows.sources[s][1], rows=n)
            for s, n in zip(source.tolist(), number.tolist(), strict=True)
        ],
        item_ids=[events.item_ids[i] for i in items.tolist()],
        item=_words(item),
        source_offset=_words(rows.offset[at]),
        event_time_us=_words(events.time_us[at]),
        event_key=_words(events.event_key[at]),
        kind=events.kind[at].astype(np.uint8).tobytes(),
        action_type=events.event_type[at].astype(np.uint8).tobytes(),
        stress=stress.astype(np.uint8).tobytes() if stress.any() else b"",
        **optional,
    ).SerializeToString()


@dataclass(slots=True)
class ItemRows:
    """Rows for items, gathered from records, whatever bucket they are of."""

    item_ids: list[str] = field(default_factory=list)
    columns: dict[str, list[Words]] = field(default_factory=dict)
    stress: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def add_record(self, value: bytes, namespace: str, marks: dict[Source, int]) -> None:
        """Rows of one record that are not below the marks, which move on. Raises: ValueError for one that is broken.

        Records of another namespace are left out.
        """
        try:
            message = ItemUpdates.FromString(value)
        except DecodeError as error:
            raise ValueError(f"{error}; expected an ItemUpdates of double11.v1") from error
        if message.namespace != namespace:
            return
        columns, stress, offset = _decode(message)
        keep, end, moved = np.zeros(len(offset), np.bool_), 0, {}
        for s in message.sources:
            start, end = end, end + s.rows
            mine, source = offset[start:end], (s.topic, s.partition)
            if not len(mine) or len(mine) != s.rows:
                raise ValueError(f"{len(offset)} rows; expected {sum(s.rows for s in message.sources)}")
            mark = marks.get(source, 0)
            keep[start:end] = mine >= mark
            moved[source] = max(mark, int(mine[-1]) + 1)
        if end != len(offset):
            raise ValueError(f"{len(offset)} rows; expected {end}")
        marks |= moved
        self._add(message.item_ids, {n: c[keep] for n, c in columns.items()}, stress[keep])

    def add_events(self, events: EventColumns, stress: npt.NDArray[np.bool_]) -> None:
        """Events that need no mark, like those of the catalogue."""
        self._add(events.item_ids, {n: getattr(events, n) for n in _NAMES}, stress)

    def events(self) -> tuple[EventColumns, npt.NDArray[np.bool_]]:
        """Everything gathered as N events, and which are stress traffic [N]."""
        coded = pa.array(self.item_ids, pa.string()).dictionary_encode()
        item_ids: list[str] = coded.dictionary.to_pylist()
        found = {n: np.concatenate([np.empty(0, np.int64), *self.columns.get(n, ())]) for n in _NAMES}
        code = np.append(coded.indices.to_numpy().astype(np.int64), -1)[found.pop("item_code")]
        # Whose action it was has been left behind; that there was somebody is what tells an action.
        user = np.where(found["kind"] == EventKind.ACTION, 0, -1)
        item_key = np.append(keys(item_ids), -1)[code]
        columns = EventColumns(
            user_ids=[""], user_code=user, item_ids=item_ids, item_code=code, item_key=item_key, **found
        )
        return columns, np.concatenate([np.empty(0, np.bool_), *self.stress])

    def _add(self, item_ids: Sequence[str], columns: Mapping[str, Words], stress: npt.NDArray[np.bool_]) -> None:
        for name, column in columns.items():
            moved = np.where(column >= 0, column + len(self.item_ids), -1) if name == "item_code" else column
            self.columns.setdefault(name, []).append(moved)
        self.item_ids += item_ids
        self.stress.append(stress)


_NAMES = ("item_code", "kind", "event_type", "time_us", "event_key", *_OPTIONAL)


def _decode(message: ItemUpdates) -> tuple[dict[str, Words], npt.NDArray[np.bool_], Words]:
    """Columns, stress marks and source offsets [R]. Raises: ValueError."""
    num_rows = len(message.kind)
    columns = {
        "item_code": _column(message.item, num_rows),
        "kind": np.frombuffer(message.kind, np.uint8).astype(np.int64),
        "event_type": np.frombuffer(message.action_type, np.uint8).astype(np.int64),
        "time_us": _column(message.event_time_us, num_rows),
        "event_key": _column(message.event_key, num_rows),
    }
    none = np.full(num_rows, -1, np.int64)
    for name, sent in _OPTIONAL.items():
        columns[name] = _column(data, num_rows) if (data := getattr(message, sent)) else none
    stress = np.frombuffer(message.stress or bytes(num_rows), np.uint8) != 0
    if len(columns["event_type"]) != num_rows or len(stress) != num_rows:
        raise ValueError(f"columns that differ in length; expected {num_rows} rows")
    code = columns["item_code"]
    if num_rows and not 0 <= int(code.min()) <= int(code.max()) < len(message.item_ids):
        raise ValueError(f"an item out of range; expected one of {len(message.item_ids)}")
    return columns, stress, _column(message.source_offset, num_rows)


def _words(column: npt.NDArray[np.int64]) -> bytes:
    return column.astype("<i8", copy=False).tobytes()


def _column(data: bytes, num_rows: int) -> Words:
    if len(data) != 8 * num_rows:
        raise ValueError(f"a column of {len(data)} bytes; expected {8 * num_rows}")
    return np.frombuffer(data, "<i8").astype(np.int64)
