"""Protobuf to EventBatch and back, with validation: what is wrong becomes a rejection with a cause, never an exception.

Shape legend: N values, M events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from double11.v1.event_pb2 import Action, Event, ForgetUser, Impression, ItemChange, PriceChange, StockChange
from google.protobuf.message import DecodeError

from recsys.core import EVENT_SCHEMA, BadInput, EventBatch, EventKind, EventType
from recsys.core.ids import ID_BYTES_MAX
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION, VALUE_BYTES_MAX
from streaming.wire import AMOUNT_MAX, TEXT_BYTES_MAX, TIME_US_MAX, decode_actions, decode_changes

ATTRIBUTES_BYTES_MAX = 16 << 10
IMPRESSION_ITEMS_MAX = 500
_INT32_MAX = (1 << 31) - 1

UNDECODABLE, INVALID, FUTURE, TOO_LARGE, UNKNOWN_VERSION, MISPLACED = (
    "undecodable",
    "invalid",
    "future",
    "too-large",
    "unknown-version",
    "misplaced",
)
CAUSES = (UNDECODABLE, INVALID, FUTURE, TOO_LARGE, UNKNOWN_VERSION, MISPLACED)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A value that could not be taken: its place, the cause in kebab-case, what came and what was expected."""

    row: int
    cause: str
    detail: str
    event_id: str = ""


@dataclass(frozen=True, slots=True)
class Decoded:
    """M events and, for each, the row [M] of the value it came from; the rejected values beside them."""

    batch: EventBatch
    row: npt.NDArray[np.int64]
    rejected: list[Rejected]


def decode_events(values: Sequence[bytes], headers: Sequence[Mapping[str, bytes]] = ()) -> Decoded:
    """N values of `events` or `catalog`. Unknown fields are skipped: a newer producer may add some."""
    current = not headers or all(h.get(SCHEMA_HEADER, SCHEMA_VERSION) == SCHEMA_VERSION for h in headers)
    if not current:
        return _decode(values, headers, Event.FromString, _event_rows)
    left, parts = np.arange(len(values)), list[tuple[EventBatch, npt.NDArray[np.int64]]]()
    for decode in (decode_changes, decode_actions) if _begins_with_change(values) else (decode_actions, decode_changes):
        batch, row = decode([v if len(v := values[i]) <= VALUE_BYTES_MAX else b"" for i in left.tolist()])
        if len(row) == len(values):
            return Decoded(batch, row, [])
        parts.append((batch, left[row]))
        left = np.setdiff1d(left, left[row], assume_unique=True)
    slow = _decode([values[i] for i in left.tolist()], (), Event.FromString, _event_rows)
    parts.append((slow.batch, left[slow.row]))
    rejected = [replace(r, row=int(left[r.row])) for r in slow.rejected]
    rows = np.concatenate([row for _, row in parts])
    order = np.argsort(rows, kind="stable")
    return Decoded(EventBatch.concat([batch for batch, _ in parts]).take(order), rows[order], rejected)


def _begins_with_change(values: Sequence[bytes]) -> bool:
    """Whether to look for price and stock changes first: a topic holds one sort of event, mostly."""
    try:
        return bool(values) and Event.FromString(values[0]).WhichOneof("body") in ("price", "stock")
    except DecodeError:
        return False


def decode_impressions(values: Sequence[bytes], headers: Sequence[Mapping[str, bytes]] = ()) -> Decoded:
    """N slates of `impressions`, each becoming one IMPRESSION action per item, event_id = slate_id#position."""
    return _decode(values, headers, Impression.FromString, _impression_rows)


def from_messages(messages: Iterable[Event]) -> Decoded:
    """Already parsed events, as EventService gets them; validated like records."""
    return _collect(((i, m) for i, m in enumerate(messages)), [], _event_rows)


def validate(message: Event) -> str | None:
    """What is wrong with an event: what came and what was expected; None when nothing is."""
    try:
        _event_rows(message)
    except ValueError as error:
        return str(error)
    return None


def encode_events(batch: EventBatch) -> Iterator[tuple[EventKind, bytes, bytes]]:
    """Each event's kind, its `record_key` and its protobuf value. Raises: BadInput for a price or stock of null."""
    columns = {name: batch.table.column(name).to_pylist() for name in EVENT_SCHEMA.names}
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        kind = EventKind(row["kind"])
        known_at = row["known_at"] if row["known_at"] != row["event_time"] else 0
        message = Event(
            event_id=row["event_id"],
            event_time_us=row["event_time"],
            known_at_us=known_at,
            stress=row["stress"],
            **_BODY[kind](row),
        )
        yield kind, record_key(message), message.SerializeToString()


def record_key(event: Event) -> bytes:
    """The user; of a catalogue change the item, NUL and what the change says, as it replaces nothing else (ADR 9)."""
    kind = event.WhichOneof("body") or ""
    body = getattr(event, kind)
    if kind in ("action", "forget"):
        return str(body.user_id).encode()
    said = [f.name for f, _ in body.ListFields() if f.name not in ("item_id", "listed")] if kind == "item" else []
    return b"\0".join((body.item_id.encode(), ",".join((kind, *said)).encode()))


def owner_of(catalog_key: bytes) -> bytes:
    """The item of a key on `catalog`: its murmur2 gives the partition, so that an item's changes keep their order."""
    return catalog_key.rpartition(b"\0")[0] or catalog_key


def _amount(row: dict[str, Any], column: str) -> int:
    """The price or stock that a change is about. Raises: BadInput for none: on the wire that would be 0."""
    value: int | None = row[column]
    if value is None:
        raise BadInput(
            f"event {row['event_id']}",
            came=f"a {column} change of item {row['item_id']} without a {column}",
            expected="a number, 0 included",
            fix="Set such rows of catalog.parquet aside: double11 data import --format canonical DIR --out NEW",
        )
    return value


_BODY: Mapping[EventKind, Callable[[dict[str, Any]], dict[str, Any]]] = {
    EventKind.ACTION: lambda r: {
        "action": Action(
            type=r["event_type"],
            user_id=r["user_id"] or "",
            item_id=r["item_id"] or "",
            session_id=r["session_id"] or "",
            request_id=r["request_id"] or "",
            position=r["position"] or 0,
            propensity=r["propensity"] or 0.0,
            price_minor=r["price"],
            quantity=r["quantity"],
        )
    },
    EventKind.PRICE: lambda r: {"price": PriceChange(item_id=r["item_id"], price_minor=_amount(r, "price"))},
    EventKind.STOCK: lambda r: {"stock": StockChange(item_id=r["item_id"], stock_units=_amount(r, "stock"))},
    EventKind.ITEM: lambda r: {
        "item": ItemChange(
            item_id=r["item_id"],
            listed=bool(r["listed"]),
            title=r["title"] or "",
            category=r["category"] or "",
            brand=r["brand"] or "",
            price_minor=r["price"],
            attributes_json=r["attributes"] or "",
        )
    },
    EventKind.FORGET: lambda r: {"forget": ForgetUser(user_id=r["user_id"])},
}

_Row = tuple[Any, ...]


def _decode(
    values: Sequence[bytes],
    headers: Sequence[Mapping[str, bytes]],
    parse: Callable[[bytes], Any],
    rows_of: Callable[[Any], list[_Row]],
) -> Decoded:
    rejected: list[Rejected] = []

    def messages() -> Iterator[tuple[int, Any]]:
        for i, value in enumerate(values):
            version = headers[i].get(SCHEMA_HEADER, SCHEMA_VERSION) if headers and headers[i] else SCHEMA_VERSION
            if version != SCHEMA_VERSION:
                detail = f"schema version {version[:32]!r}; expected {SCHEMA_VERSION!r}"
                rejected.append(Rejected(i, UNKNOWN_VERSION, detail))
            elif len(value) > VALUE_BYTES_MAX:
                rejected.append(Rejected(i, TOO_LARGE, f"{len(value)} bytes; expected at most {VALUE_BYTES_MAX}"))
            else:
                try:
                    yield i, parse(value)
                except DecodeError as error:
                    rejected.append(Rejected(i, UNDECODABLE, f"{error}; expected a protobuf of double11.v1"))

    return _collect(messages(), rejected, rows_of)


def _collect(
    messages: Iterable[tuple[int, Any]], rejected: list[Rejected], rows_of: Callable[[Any], list[_Row]]
) -> Decoded:
    rows: list[_Row] = []
    origin: list[int] = []
    for i, message in messages:
        try:
            new = rows_of(message)
        except ValueError as error:
            event_id = getattr(message, "event_id", "") or getattr(message, "request_id", "")
            rejected.append(Rejected(i, INVALID, str(error)[:1024], event_id[:ID_BYTES_MAX]))
            continue
        rows += new
        origin += [i] * len(new)
    columns = zip(*rows, strict=True) if rows else [()] * len(EVENT_SCHEMA)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, EVENT_SCHEMA, strict=True)]
    batch = EventBatch(pa.table(arrays, schema=EVENT_SCHEMA))
    return Decoded(batch, np.array(origin, np.int64), rejected)


def _event_rows(e: Event) -> list[_Row]:
    """The event as one row in the order of EVENT_SCHEMA. Raises: ValueError."""
    event_id, time_us, known_us = e.event_id, e.event_time_us, e.known_at_us
    _check_id("event_id", event_id)
    _check_times(time_us, known_us)
    known_us = known_us or time_us
    body = e.WhichOneof("body")
    if body == "action":
        return [_action_row(event_id, time_us, known_us, e.action, e.stress)]
    user_id = item_id = price = stock = listed = title = category = brand = attributes = None
    if body == "price":
        kind, item_id, price = EventKind.PRICE, e.price.item_id, e.price.price_minor
    elif body == "stock":
        kind, item_id, stock = EventKind.STOCK, e.stock.item_id, e.stock.stock_units
        _check_amount("stock_units", stock)
    elif body == "item":
        i = e.item
        kind, item_id, listed = EventKind.ITEM, i.item_id, i.listed
        title, category, brand, attributes = (
            _text(i.title),
            _text(i.category),
            _text(i.brand),
            i.attributes_json or None,
        )
        size = len(attributes.encode()) if attributes else 0
        _check(size <= ATTRIBUTES_BYTES_MAX, "attributes_json", f"{size} bytes", f"at most {ATTRIBUTES_BYTES_MAX}")
        price = i.price_minor if i.HasField("price_minor") else None
    elif body == "forget":
        kind, user_id = EventKind.FORGET, e.forget.user_id
    else:
        raise ValueError("no body; expected action, price, stock, item or forget")
    _check_amount("price_minor", price)
    _check_id("user_id" if body == "forget" else "item_id", user_id if body == "forget" else item_id)
    return [
        (
            event_id, int(kind), 0, time_us, known_us, user_id, item_id, None, None, None, None, price, None, stock,
            listed, title, category, brand, attributes, False, e.stress,
        )
    ]  # fmt: skip


def _action_row(event_id: str, time_us: int, known_us: int, a: Action, stress: bool) -> _Row:
    user_id, item_id, kind = a.user_id, a.item_id, a.type
    _check_id("user_id", user_id)
    _check_id("item_id", item_id)
    _check(0 < kind <= EventType.RETURN, "action type", kind, "1 to 6")
    price = a.price_minor if a.HasField("price_minor") else None
    quantity = a.quantity if a.HasField("quantity") else None
    position, propensity = a.position, a.propensity
    _check_amount("price_minor", price)
    _check(quantity is None or quantity >= 1, "quantity", quantity, "at least 1")
    _check(position >= 0, "position", position, "from 1, or 0 for unknown")
    _check(0.0 <= propensity <= 1.0, "propensity", propensity, "above 0 and at most 1, or 0 for unknown")
    return (
        event_id, 1, kind, time_us, known_us, user_id, item_id, _text(a.session_id), _text(a.request_id),
        position or None, propensity or None, price, quantity, None, None, None, None, None, None, False, stress,
    )  # fmt: skip


def _impression_rows(m: Impression) -> list[_Row]:
    """One row per item of a slate. Raises: ValueError."""
    request_id, user_id, session_id = m.request_id, m.user_id, _text(m.session_id)
    _check_id("request_id", request_id)
    slate_id = m.slate_id or request_id
    _check_id("slate_id", slate_id)
    _check_id("user_id", user_id)
    _check_times(m.event_time_us, 0)
    _check(len(m.items) <= IMPRESSION_ITEMS_MAX, "items", len(m.items), f"at most {IMPRESSION_ITEMS_MAX}")
    rows = []
    for item in m.items:
        _check_id("item_id", item.item_id)
        _check(1 <= item.position <= _INT32_MAX, "position", item.position, "from 1")
        _check(0.0 <= item.propensity <= 1.0, "propensity", item.propensity, "above 0 and at most 1, or 0 for unknown")
        _check(math.isfinite(item.score), "score", item.score, "a finite number")
        rows.append(
            (
                f"{slate_id}#{item.position}", 1, int(EventType.IMPRESSION), m.event_time_us, m.event_time_us,
                user_id, item.item_id, session_id, request_id, item.position, item.propensity or None,
                None, None, None, None, None, None, None, None, False, m.stress,
            )
        )  # fmt: skip
    return rows


def _check(holds: bool, name: str, came: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} {came}; expected {expected}")


def _check_id(name: str, value: str | None) -> None:
    if not value:
        raise ValueError(f"no {name}; expected 1 to {ID_BYTES_MAX} bytes")
    if len(value) * 4 > ID_BYTES_MAX and len(value.encode()) > ID_BYTES_MAX:
        raise ValueError(f"{name} of {len(value.encode())} bytes; expected 1 to {ID_BYTES_MAX}")


def _check_amount(name: str, value: int | None) -> None:
    _check(value is None or 0 <= value <= AMOUNT_MAX, name, value, f"0 to {AMOUNT_MAX}")


def _check_times(time_us: int, known_us: int) -> None:
    _check(0 < time_us < TIME_US_MAX, "event_time_us", time_us, "microseconds UTC since 1970, before 2100")
    _check(
        known_us == 0 or time_us <= known_us < TIME_US_MAX, "known_at_us", known_us, "0, or not before event_time_us"
    )


def _text(value: str) -> str | None:
    if len(value) * 4 > TEXT_BYTES_MAX and len(value.encode()) > TEXT_BYTES_MAX:
        raise ValueError(f"text of {len(value.encode())} bytes; expected at most {TEXT_BYTES_MAX}")
    return value or None
