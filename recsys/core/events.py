"""EventBatch: the one form of events inside double11, an Arrow table with a fixed schema.

Protobuf to batch is `streaming.codec`; Parquet to batch is `recsys.data`. Times are int64 microseconds UTC, prices
int64 minor units (cents, fen), ids strings. The enum numbers are those of protos/double11/v1/event.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import BadInput


class EventKind(IntEnum):
    """Which member of the proto's oneof an event is."""

    ACTION = 1
    PRICE = 2
    STOCK = 3
    ITEM = 4
    FORGET = 5


class EventType(IntEnum):
    """What a shopper did (kind ACTION). 0 for the other kinds."""

    NONE = 0
    IMPRESSION = 1
    VIEW = 2
    FAVORITE = 3
    CART = 4
    PURCHASE = 5
    RETURN = 6

    @property
    def label(self) -> str:
        """The lower-case word used in dataset directories."""
        return self.name.lower()


EVENT_TYPE_BY_LABEL: Mapping[str, EventType] = {t.label: t for t in EventType if t is not EventType.NONE}

EVENT_SCHEMA = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("kind", pa.int8(), nullable=False),  # EventKind
        pa.field("event_type", pa.int8(), nullable=False),  # EventType, 0 unless kind is ACTION
        pa.field("event_time", pa.int64(), nullable=False),  # microseconds, UTC
        pa.field("known_at", pa.int64(), nullable=False),  # microseconds, UTC; event_time unless it was learnt later
        pa.field("user_id", pa.string()),  # ACTION, FORGET
        pa.field("item_id", pa.string()),  # all but FORGET
        pa.field("session_id", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("position", pa.int32()),  # rank in the slate, from 1
        pa.field("propensity", pa.float32()),  # probability that the logging policy showed it there, (0, 1]
        pa.field("price", pa.int64()),  # minor units
        pa.field("quantity", pa.int32()),
        pa.field("stock", pa.int64()),  # units left (kind STOCK)
        pa.field("listed", pa.bool_()),  # kind ITEM: true = list or update, false = delist
        pa.field("title", pa.string()),
        pa.field("category", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("attributes", pa.string()),  # JSON object
        pa.field("late", pa.bool_(), nullable=False),
        pa.field("stress", pa.bool_(), nullable=False),
    ]
)
_DEFAULTS: Mapping[str, Any] = {"event_type": 0, "late": False, "stress": False}


@dataclass(frozen=True, slots=True)
class EventBatch:
    """N events as columns. Construct with `from_columns` or `from_table`, which check the schema."""

    table: pa.Table

    @classmethod
    def from_table(cls, table: pa.Table) -> EventBatch:
        """Bring a table with any subset of the columns into EVENT_SCHEMA.

        known_at defaults to event_time, event_type to 0, late and stress to false, everything else to null.
        Raises: BadInput for an unknown column, a wrong type or a null where none may be.
        """
        unknown = set(table.column_names) - set(EVENT_SCHEMA.names)
        if unknown:
            raise BadInput(
                "event columns", came=sorted(unknown), expected=f"a subset of {EVENT_SCHEMA.names}", fix="Rename them."
            )
        n, columns = table.num_rows, []
        for field in EVENT_SCHEMA:
            if field.name in table.column_names:
                column = table.column(field.name)
                if column.type != field.type:
                    column = _cast(column, field)
            elif field.name == "known_at" and "event_time" in table.column_names:
                column = _cast(table.column("event_time"), field)
            elif field.name in _DEFAULTS:
                column = pa.repeat(pa.scalar(_DEFAULTS[field.name], field.type), n)
            elif field.nullable:
                column = pa.nulls(n, field.type)
            else:
                raise BadInput(f"event column {field.name}", came="no such column", expected=str(field), fix="Add it.")
            if not field.nullable and column.null_count:
                raise BadInput(
                    f"event column {field.name}",
                    came=f"{column.null_count} nulls in {n} rows",
                    expected="a value in every row",
                    fix="Fill or drop those rows.",
                )
            columns.append(column)
        return cls(pa.table(columns, schema=EVENT_SCHEMA))

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any] | npt.NDArray[Any] | pa.Array]) -> EventBatch:
        """As `from_table`, from lists or arrays of one length."""
        arrays = {n: v if isinstance(v, pa.Array | pa.ChunkedArray) else pa.array(v) for n, v in columns.items()}
        return cls.from_table(pa.table(arrays))

    @classmethod
    def empty(cls) -> EventBatch:
        """No events."""
        return cls(EVENT_SCHEMA.empty_table())

    @classmethod
    def concat(cls, batches: Sequence[EventBatch]) -> EventBatch:
        """All rows of all batches, in order."""
        return cls(pa.concat_tables([b.table for b in batches])) if batches else cls.empty()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def numpy(self, name: str) -> npt.NDArray[Any]:
        """One column as NumPy, zero-copy where Arrow allows; nulls of number columns become NaN."""
        values: npt.NDArray[Any] = self.table.column(name).to_numpy()
        return values

    def strings(self, name: str) -> list[str | None]:
        """One string column as Python strings."""
        values: list[str | None] = self.table.column(name).to_pylist()
        return values

    def filter(self, mask: npt.NDArray[np.bool_] | pa.Array | pa.ChunkedArray) -> EventBatch:
        """The rows where mask is true, order kept."""
        return EventBatch(self.table.filter(pa.array(mask) if isinstance(mask, np.ndarray) else mask))

    def take(self, rows: npt.NDArray[np.int64]) -> EventBatch:
        """The given rows in the given order."""
        return EventBatch(self.table.take(pa.array(rows)))

    def slice(self, offset: int, length: int) -> EventBatch:
        """Rows [offset, offset + length), zero-copy."""
        return EventBatch(self.table.slice(offset, length))

    def of_kind(self, *kinds: EventKind) -> EventBatch:
        """The rows of the given kinds."""
        return self.filter(pc.is_in(self.table.column("kind"), pa.array([int(k) for k in kinds], pa.int8())))

    def chunks(self, rows_max: int) -> Iterator[EventBatch]:
        """Consecutive slices of at most rows_max rows."""
        for start in range(0, len(self), rows_max):
            yield self.slice(start, rows_max)


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        if pa.types.is_timestamp(column.type) and pa.types.is_int64(field.type):
            column = pc.cast(column, pa.timestamp("us", tz=column.type.tz))
        return pc.cast(column, field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadInput(
            f"event column {field.name}",
            came=f"{column.type} ({error})",
            expected=str(field.type),
            fix="Cast the column before handing it over.",
        ) from error
