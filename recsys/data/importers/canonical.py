"""canonical: a dataset directory made by others, checked and rewritten.

Missing columns, other types, unknown event types and rows out of time order are refused. Rows that break a rule are
set aside: a repeated event_id, an empty or over-long id, a time not after 1970-01-01 or not before 2100, a position or
quantity below 1, a propensity outside (0, 1], a price or stock below 0 or above 2^40, a session_id or request_id of
more than 4,096 bytes, a change of price or stock that does not say to what, an item that nothing dates. Items that
only events or listings of catalog.parquet know are added, and the first of those is the time of items without
availability (or at such a time), unless dataset.json declares the catalogue static; both are counted in dataset.json,
and so are items that are available only after their first event, which stay as they are. Columns that the contract
does not know are left out and named there.

Prices: an integer column is minor units (cents) as it stands; a float column is major units (2.55) and is multiplied
by 100 and rounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from recsys.core.errors import BadInput, NotFound
from recsys.core.logging import get_logger
from recsys.data import schema
from recsys.data.importers import base
from streaming.archive import read_items
from streaming.wire import AMOUNT_MAX, TEXT_BYTES_MAX

_log = get_logger(__name__)
_FIX = "Mend the column where the directory is made."


def _read(source: base.Source) -> base.Imported:
    folder = source.path
    info = _info(folder)
    events, ignored = _table(folder, "events", schema.EVENT_COLUMNS, schema.EVENT_REQUIRED)
    if (folder / "events").is_dir():  # an archive: in the order of arrival
        events = events.sort("event_time", maintain_order=True)
    _check_labels(events, folder, "event_type", schema.EVENT_TYPES)
    _check_order(events, folder)
    events, rejected = base.split(events, _file(folder, "events"), _rules(events, ("user_id", "item_id")))
    catalog = None
    if _files(folder, "catalog"):
        catalog, more = _table(folder, "catalog", schema.CATALOG_COLUMNS, schema.CATALOG_REQUIRED)
        ignored += more
        _check_labels(catalog, folder, "kind", schema.CATALOG_KINDS)
        catalog, rejected_changes = base.split(catalog, _file(folder, "catalog"), _rules(catalog, ("item_id",)))
        rejected = pl.concat([rejected, rejected_changes])
        catalog = catalog.drop(base.LINE)
    items, more = _items(folder)
    ignored += more
    is_static, seen = bool(info.get("static_catalogue", False)), _first_seen(events, catalog)
    items, rejected_items = base.split(items, _file(folder, "items"), _item_rules(items, seen, is_static))
    items, added = _complete(items.drop(base.LINE), seen, is_static)
    users = None
    if _files(folder, "users"):
        users, more = _table(folder, "users", schema.USER_COLUMNS, schema.USER_REQUIRED)
        ignored += more
        users = users.drop(base.LINE)
    return base.Imported(
        events=events.drop(base.LINE),
        items=items,
        rejected=pl.concat([rejected, rejected_items]),
        users=users,
        catalog=catalog,
        static_catalogue=is_static,
        info={
            **{k: info[k] for k in ("source", "licence") if k in info},
            **added,
            **({"ignored_columns": ignored} if ignored else {}),
        },
    )


def _info(source: Path) -> dict[str, Any]:
    path = source / "dataset.json"
    if not source.is_dir():
        raise NotFound(str(source), came="no such folder", expected="a dataset directory", fix="Correct the path.")
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BadInput(str(path), came=str(error), expected="JSON", fix="Mend it.") from error
    if not isinstance(info, dict):
        raise BadInput(str(path), came=type(info).__name__, expected="a JSON object", fix="Mend it.")
    return info


def _files(source: Path, name: str) -> list[Path]:
    folder, file = source / name, source / f"{name}.parquet"
    return sorted(folder.glob("day=*/*.parquet")) if folder.is_dir() else [file] * file.is_file()


def _file(source: Path, name: str) -> Path:
    return source / (name if (source / name).is_dir() else f"{name}.parquet")


def _table(
    source: Path, name: str, columns: Mapping[str, pl.DataType], required: tuple[str, ...]
) -> tuple[pl.DataFrame, list[str]]:
    """(the contract's columns in the contract's types and a line number, names of the other columns)."""
    files = _files(source, name)
    if not files:
        raise NotFound(f"{source}", came=f"no {name}.parquet", expected=f"{name}.parquet", fix="Correct the path.")
    frames, ignored = [], set[str]()
    for file in files:
        try:
            frame = pl.read_parquet(file, hive_partitioning=False)
        except (pl.exceptions.PolarsError, OSError) as error:
            fix = "Write or copy it again."
            raise BadInput(str(file), came=str(error), expected="Parquet written to the end", fix=fix) from error
        if missing := [c for c in required if c not in frame.columns]:
            expected = f"columns {', '.join(required)}"
            raise BadInput(str(file), came=f"no {', '.join(missing)}", expected=expected, fix=_FIX)
        ignored |= set(frame.columns) - set(columns)
        known = [c for c in columns if c in frame.columns]
        frames.append(frame.select(_typed(frame[c], columns[c], file) for c in known))
        for column in required:
            if frame[column].null_count():
                row = int(frame[column].is_null().arg_max() or 0) + 1
                raise BadInput(f"{file}, row {row}, column {column}", came="null", expected="a value", fix=_FIX)
    whole = pl.concat(frames, how="diagonal").with_row_index(base.LINE, offset=1)
    return whole.with_columns(pl.col(base.LINE).cast(pl.Int64)), sorted(f"{name}.{c}" for c in ignored)


def _items(source: Path) -> tuple[pl.DataFrame, list[str]]:
    """As `_table`; of an archive what its parts say together."""
    if not (source / "items").is_dir():
        return _table(source, "items", schema.ITEM_COLUMNS, schema.ITEM_REQUIRED)
    items = read_items(source).select(*schema.ITEM_COLUMNS).with_row_index(base.LINE, offset=1)
    return items.with_columns(pl.col(base.LINE).cast(pl.Int64)), []


def _typed(column: pl.Series, wanted: pl.DataType, file: Path) -> pl.Series:
    """The column in the contract's type where that loses nothing.

    Raises: BadInput for another kind of column, a float that is no amount of money, a number out of range.
    """
    found = column.dtype
    if found == wanted or found == pl.Null:
        return column.cast(wanted)
    if wanted == schema.TIME and isinstance(found, pl.Datetime):
        micros = column.cast(pl.Datetime("us", found.time_zone))
        return micros.dt.convert_time_zone("UTC") if found.time_zone else micros.dt.replace_time_zone("UTC")
    if wanted == pl.String and found in (pl.Categorical, pl.Enum):
        return column.cast(pl.String)
    try:
        if column.name == "price" and found.is_float():
            return column.to_frame().select(base.minor_units(pl.col("price").cast(pl.Float64))).to_series()
        if (wanted.is_integer() and found.is_integer()) or (wanted.is_float() and found.is_numeric()):
            return column.cast(wanted)
    except pl.exceptions.PolarsError as error:
        raise BadInput(f"{file}, column {column.name}", came=str(error), expected=str(wanted), fix=_FIX) from error
    raise BadInput(f"{file}, column {column.name}", came=str(found), expected=str(wanted), fix=_FIX)


def _check_labels(frame: pl.DataFrame, source: Path, column: str, known: tuple[str, ...]) -> None:
    unknown = ~frame[column].is_in(list(known))
    if unknown.any():
        row = int(unknown.arg_max() or 0)
        file = _file(source, "events" if column == "event_type" else "catalog")
        where = f"{file}, row {frame[base.LINE][row]}, column {column}"
        raise BadInput(where, came=repr(frame[column][row]), expected=f"one of {', '.join(known)}", fix=_FIX)


def _check_order(events: pl.DataFrame, source: Path) -> None:
    times = events["event_time"]
    if not times.is_sorted():
        row = int((times.diff().dt.total_microseconds() < 0).arg_max() or 0)
        raise BadInput(
            f"{_file(source, 'events')}, row {row + 1}, column event_time",
            came=f"{times[row]} after {times[row - 1]}",
            expected="rows sorted by event_time",
            fix="Sort the file by event_time; ties keep their order.",
        )


def _rules(frame: pl.DataFrame, ids: tuple[str, ...]) -> dict[str, pl.Expr]:
    """What sets a row aside; rules on columns that are not there are left out."""

    def unsaid(column: str) -> pl.Expr:
        return pl.col(column).is_null() if column in frame.columns else pl.lit(True)

    rules = {
        "duplicate_event_id": ("event_id", ~pl.col("event_id").is_first_distinct()),
        "bad_id": ("event_id", base.bad_ids("event_id", *ids)),
        "bad_time": ("event_time", base.bad_time(*(c for c in ("event_time", "known_at") if c in frame.columns))),
        "bad_position": ("position", pl.col("position") < 1),
        "bad_propensity": ("propensity", ~((pl.col("propensity") > 0) & (pl.col("propensity") <= 1))),
        "negative_price": ("price", pl.col("price") < 0),
        "bad_quantity": ("quantity", pl.col("quantity") < 1),
        "negative_stock": ("stock", pl.col("stock") < 0),
        "price_too_high": ("price", pl.col("price") > AMOUNT_MAX),
        "stock_too_high": ("stock", pl.col("stock") > AMOUNT_MAX),
        "session_id_too_long": ("session_id", pl.col("session_id").str.len_bytes() > TEXT_BYTES_MAX),
        "request_id_too_long": ("request_id", pl.col("request_id").str.len_bytes() > TEXT_BYTES_MAX),
        "no_price": ("kind", (pl.col("kind") == "price") & unsaid("price")),
        "no_stock": ("kind", (pl.col("kind") == "stock") & unsaid("stock")),
        "known_before_it_happened": ("known_at", pl.col("known_at") < pl.col("event_time")),
    }
    return {name: rule for name, (column, rule) in rules.items() if column in frame.columns}


def _first_seen(events: pl.DataFrame, catalog: pl.DataFrame | None) -> dict[str, pl.DataFrame]:
    """Where items are seen -> item_id and available_from, the time of the item's first event or listing there."""
    seen = {"events": base.items_from_events(events)}
    if catalog is not None:
        seen["catalog"] = base.items_from_events(catalog.filter(pl.col("kind") == "list").sort("event_time"))
    return seen


def _item_rules(items: pl.DataFrame, seen: Mapping[str, pl.DataFrame], is_static: bool) -> dict[str, pl.Expr]:
    """What sets an item aside. Want of a time does only where nothing seen and no static catalogue makes up for it."""
    rules = {"bad_id": base.bad_ids("item_id"), "repeated_item": ~pl.col("item_id").is_first_distinct()}
    if is_static:
        return rules
    is_seen = pl.col("item_id").is_in(pl.concat(first["item_id"] for first in seen.values()).unique().implode())
    if "available_from" not in items.columns:
        return {**rules, "no_time": ~is_seen}
    bad, absent = base.bad_time("available_from"), pl.col("available_from").is_null()
    return {**rules, "bad_time": bad & ~is_seen, "no_time": absent & ~is_seen}


def _complete(
    items: pl.DataFrame, seen: Mapping[str, pl.DataFrame], is_static: bool
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Add the items that were only seen and the availability that is missing; (items, what was done or odd)."""
    changed = {}
    for where, first in seen.items():
        unknown = first.join(items, on="item_id", how="anti").select("item_id")
        changed[f"items_added_from_{where}"] = unknown.height
        items = pl.concat([items, unknown], how="diagonal")
    if "available_from" in items.columns:
        items = items.with_columns(pl.when(~base.bad_time("available_from")).then("available_from"))
    if is_static:
        return items, {name: count for name, count in changed.items() if count}
    if "available_from" not in items.columns:
        items = items.with_columns(available_from=pl.lit(None, schema.TIME))
    dated = items
    for where, first in seen.items():
        first = first.rename({"available_from": where})
        dated = dated.join(first, on="item_id", how="left", maintain_order="left")
    earliest = pl.min_horizontal(*seen)
    origin = pl.coalesce(pl.when(pl.col(where) == earliest).then(pl.lit(where)) for where in seen)
    origins = dated.filter(pl.col("available_from").is_null()).select(origin.alias("origin"))["origin"]
    changed |= {f"availability_from_{where}": int((origins == where).sum()) for where in seen}
    if late := int((dated["available_from"] > dated["events"]).sum()):
        changed["availability_after_first_event"] = late
        fix = "leave available_from empty where it is the day of an export: then it is the first event's time"
        _log.warning("available_after_first_event", items=late, of=len(dated), fix=fix)
    items = dated.with_columns(pl.coalesce("available_from", earliest)).drop(*seen)
    return items, {name: count for name, count in changed.items() if count}


IMPORTER = base.Importer(format="canonical", licence="not stated", read=_read)
