"""Columns of a dataset directory and the checks on them. Polars inside, Arrow at the file.

Times are Datetime[us, UTC], prices Int64 minor units (cents, fen). Required columns come first and are never null.
Source: docs/architecture.md, "Dataset directory".
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from recsys.core.errors import BadInput
from recsys.core.events import EVENT_TYPE_BY_LABEL

TIME = pl.Datetime("us", "UTC")
EVENT_TYPES = tuple(EVENT_TYPE_BY_LABEL)
CATALOG_KINDS = ("list", "delist", "price", "stock")

EVENT_COLUMNS: Mapping[str, pl.DataType] = {
    "event_id": pl.String(),
    "user_id": pl.String(),
    "item_id": pl.String(),
    "event_type": pl.String(),
    "event_time": TIME,
    "session_id": pl.String(),
    "request_id": pl.String(),
    "position": pl.Int32(),
    "propensity": pl.Float32(),
    "price": pl.Int64(),
    "quantity": pl.Int32(),
    "known_at": TIME,
    "late": pl.Boolean(),
    "stress": pl.Boolean(),
}
EVENT_REQUIRED = ("event_id", "user_id", "item_id", "event_type", "event_time")

ITEM_COLUMNS: Mapping[str, pl.DataType] = {
    "item_id": pl.String(),
    "available_from": TIME,
    "title": pl.String(),
    "category": pl.String(),
    "brand": pl.String(),
    "price": pl.Int64(),
    "attributes": pl.String(),
}
ITEM_REQUIRED = ("item_id",)

USER_COLUMNS: Mapping[str, pl.DataType] = {"user_id": pl.String(), "attributes": pl.String()}
USER_REQUIRED = ("user_id",)

CATALOG_COLUMNS: Mapping[str, pl.DataType] = {
    "event_id": pl.String(),
    "item_id": pl.String(),
    "event_time": TIME,
    "kind": pl.String(),
    "known_at": TIME,
    "price": pl.Int64(),
    "stock": pl.Int64(),
}
CATALOG_REQUIRED = ("event_id", "item_id", "event_time", "kind")

REJECTED_COLUMNS: Mapping[str, pl.DataType] = {
    "file": pl.String(),
    "line": pl.Int64(),
    "cause": pl.String(),
    "row": pl.String(),  # the source row as a JSON object
}

_ARROW: Mapping[pl.DataType, pa.DataType] = {
    pl.String(): pa.string(),
    pl.Int32(): pa.int32(),
    pl.Int64(): pa.int64(),
    pl.Float32(): pa.float32(),
    pl.Boolean(): pa.bool_(),
    TIME: pa.timestamp("us", tz="UTC"),
}


def conform(
    frame: pl.DataFrame, columns: Mapping[str, pl.DataType], required: tuple[str, ...], what: str
) -> pl.DataFrame:
    """The frame with the contract's columns in the contract's order and types; optional absent columns stay absent.

    Raises: BadInput for a missing or unknown column, a type that does not convert, a null where none may be.
    """
    missing = [c for c in required if c not in frame.columns]
    unknown = [c for c in frame.columns if c not in columns]
    if missing or unknown:
        came = f"no {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise BadInput(what, came=came, expected=f"columns {', '.join(columns)}", fix="Rename, add or drop columns.")
    names = [c for c in columns if c in frame.columns]
    try:
        frame = frame.select(pl.col(c).cast(columns[c]) for c in names)
    except pl.exceptions.PolarsError as error:
        raise BadInput(what, came=str(error), expected=_types(columns, names), fix="Cast the column first.") from error
    for name in required:
        if nulls := frame[name].null_count():
            row = int(frame[name].is_null().arg_max() or 0)
            raise BadInput(
                f"{what}, column {name}",
                came=f"{nulls} nulls, the first in row {row}",
                expected="a value in every row",
                fix="Fill or drop those rows.",
            )
    return frame


def arrow_schema(columns: Mapping[str, pl.DataType], present: list[str], required: tuple[str, ...]) -> pa.Schema:
    """The Arrow schema of the present columns."""
    return pa.schema([pa.field(c, _ARROW[columns[c]], nullable=c not in required) for c in present])


def _types(columns: Mapping[str, pl.DataType], names: list[str]) -> str:
    return ", ".join(f"{c}: {columns[c]}" for c in names)
