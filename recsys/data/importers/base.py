"""What every importer shares: what it gives back, and how rows are read, parsed and set aside.

A cell that cannot be read as its type is BadInput with file, line and column: the file is not what was named. A row
that can be read but breaks a rule of the format (no customer, a quantity of zero) is set aside with its cause. What is
said of an item and the log would refuse (a title of 200,000 bytes) is left out and counted: the item's events are good.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from polars.datatypes import DataTypeClass

from recsys.core.errors import BadInput, NotFound
from recsys.core.ids import ID_BYTES_MAX
from recsys.data import schema
from streaming.codec import ATTRIBUTES_BYTES_MAX
from streaming.wire import AMOUNT_MAX, TEXT_BYTES_MAX, TIME_US_MAX

_CHUNK_BYTES = 1 << 20
LINE = "line"  # of the source file, from 1, the header counted
_PARSED = "_parsed"
_ID_COLUMNS = ("user_id", "item_id")
_ITEM_BYTES_MAX = {**dict.fromkeys(("title", "category", "brand"), TEXT_BYTES_MAX), "attributes": ATTRIBUTES_BYTES_MAX}
_FIX = "Check --format and the file."


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What to import. scratch is a folder for unpacked files, removed afterwards."""

    path: Path  # a file or the folder that holds it
    options: Mapping[str, str]
    scratch: Path

    def find(self, *patterns: str) -> Path:
        """The path itself if it is a file, else the only file in the folder that matches one of the patterns.

        Raises: NotFound when there is none; BadInput when there are several.
        """
        if self.path.is_file():
            return self.path
        found = sorted({p for pattern in patterns for p in self.path.glob(pattern) if p.is_file()})
        if not found:
            came, expected = "none of its files fits", " or ".join(patterns)
            raise NotFound(f"source {self.path}", came=came, expected=expected, fix="Correct the path.")
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise BadInput(f"source {self.path}", came=names, expected="one file", fix="Name the file itself.")
        return found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an importer read: events in time order, items; columns as in recsys.data.schema."""

    events: pl.DataFrame | Iterable[pl.DataFrame]  # several are read before the scratch folder is removed
    items: pl.DataFrame
    rejected: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=dict(schema.REJECTED_COLUMNS)))
    users: pl.DataFrame | None = None
    catalog: pl.DataFrame | None = None
    static_catalogue: bool = False
    info: Mapping[str, object] = field(default_factory=dict)  # what else dataset.json should say


@dataclass(frozen=True, slots=True, kw_only=True)
class Importer:
    """One format."""

    format: str
    licence: str
    read: Callable[[Source], Imported]
    options: Mapping[str, str] = field(default_factory=dict)  # name -> what it does
    package_source: Callable[[], Path] | None = None  # where the data lies when it comes with a package


def fingerprint(path: Path) -> str:
    """First 12 hex digits of the file's SHA-256: with the line it makes an event_id, the same at every import."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()[:12]


def unpacked(path: Path, scratch: Path) -> Path:
    """The path itself, or for .gz the unpacked copy in `scratch`: a cut-off archive is noticed before a row is read.

    Raises: BadInput for an empty file or gzip data that is damaged or cut off.
    """
    if path.stat().st_size == 0:
        raise BadInput(str(path), came="an empty file", expected="rows", fix="Download it again.")
    if path.suffix != ".gz":
        return path
    plain = scratch / path.stem
    try:
        with gzip.open(path, "rb") as source, plain.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
    except (EOFError, OSError, zlib.error) as error:
        raise BadInput(str(path), came=str(error), expected="whole gzip data", fix="Download it again.") from error
    if plain.stat().st_size == 0:
        raise BadInput(str(path), came="nothing inside", expected="rows", fix="Download it again.")
    return plain


def csv_batches(
    path: Path, scratch: Path, *, required: Sequence[str], header: bool = True, rows_max: int = 1 << 21
) -> Iterator[pl.DataFrame]:
    """The required columns as strings and `line`, rows_max rows at a time, in order.

    A file without header must have exactly the required columns, in that order.
    Raises: BadInput for missing columns, too long rows, stray quotes, bytes that are not UTF-8, an empty or cut-off
    file.
    """
    plain = unpacked(path, scratch)
    try:
        scan = pl.scan_csv(
            plain,
            has_header=header,
            infer_schema=False,
            row_index_name=LINE,
            row_index_offset=2 if header else 1,
        )
        names = [c for c in scan.collect_schema().names() if c != LINE]
        wanted = [pl.col(LINE).cast(pl.Int64), *_by_name(names, path, required, header)]
        # A column that nothing asks for is not parsed, and a stray quote in it swallows rows: so all are measured.
        parsed = pl.sum_horizontal(pl.exclude(LINE).str.len_bytes()).alias(_PARSED)
        num_rows = 0
        for batch in scan.select(*wanted, parsed).collect_batches(chunk_size=rows_max, maintain_order=True):
            num_rows += len(batch)
            yield batch.drop(_PARSED)
    except (pl.exceptions.PolarsError, OSError) as error:
        line, came, fix = _bad_line(plain)
        where = f"{path}, line {line}" if line else str(path)
        raise BadInput(where, came=came or str(error).split("\n")[0], expected="CSV in UTF-8", fix=fix) from error
    if not num_rows:
        raise BadInput(str(path), came="a header and no rows", expected="rows", fix="Download it again.")


def read_csv(path: Path, scratch: Path, *, required: Sequence[str]) -> pl.DataFrame:
    """All of `csv_batches` of a file with a header in one frame."""
    return pl.concat(csv_batches(path, scratch, required=required))


def _by_name(names: list[str], path: Path, required: Sequence[str], header: bool) -> list[pl.Expr]:
    """The required columns of a file that has the columns `names`."""
    if not header:
        if len(names) != len(required):
            expected = f"{len(required)}: {', '.join(required)}"
            raise BadInput(f"{path}, line 1", came=f"{len(names)} columns", expected=expected, fix=_FIX)
        return [pl.col(name).alias(column) for name, column in zip(names, required, strict=True)]
    if missing := [c for c in required if c not in names]:
        came = f"columns {', '.join(names)}; no {', '.join(missing)}"
        raise BadInput(f"{path}, line 1", came=came, expected=f"columns {', '.join(required)}", fix=_FIX)
    return [pl.col(c) for c in required]


def _bad_line(plain: Path) -> tuple[int, str, str]:
    """(line where the first row that is no CSV begins, what came there, what to do); 0 when there is none."""
    stray, mend = 'a stray "', 'Put its value in quotes, and write "" for each quote inside.'
    quotes = width = 0
    line = 1

    def counted(file: Iterable[str]) -> Iterator[str]:
        nonlocal quotes
        for text in file:
            quotes += text.count('"')
            yield text

    with plain.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(counted(file), strict=True)
        try:
            for row in rows:
                width = width or len(row)
                if quotes % 2:
                    return line, stray, mend
                if len(row) > width:
                    return line, "too many values", _FIX
                line = rows.line_num + 1
        except csv.Error:  # the row goes on to the next quote or the end of the file
            return line, stray, mend
    return 0, "", _FIX


def read_json_lines(path: Path, scratch: Path, *, columns: Sequence[str]) -> pl.DataFrame:
    """The named fields of a file of JSON objects, one a line, as strings (lists as JSON), and `line`; absent = null.

    Raises: BadInput with the line that is not a JSON object; an empty or cut-off file.
    """
    plain = unpacked(path, scratch)
    try:
        frame = pl.read_ndjson(plain, schema=dict.fromkeys(columns, pl.String))
    except (pl.exceptions.PolarsError, OSError) as error:
        with plain.open("rb") as lines:
            bad = next((n for n, line in enumerate(lines, 1) if line.strip() and not _is_object(line)), 0)
        raise BadInput(f"{path}, line {bad}", came=str(error), expected="a JSON object a line", fix=_FIX) from error
    if frame.is_empty():
        raise BadInput(str(path), came="no line", expected="a JSON object a line", fix=_FIX)
    return frame.with_row_index(LINE, offset=1).with_columns(pl.col(LINE).cast(pl.Int64))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_parquet(path: Path, columns: Mapping[str, DataTypeClass]) -> pl.DataFrame:
    """The named columns of a Parquet file.

    Raises: NotFound; BadInput for a file that is not whole, a missing column or another type.
    """
    if not path.is_file():
        raise NotFound(str(path), came="no such file", expected="a Parquet file", fix="Correct the path.")
    try:
        found = pl.read_parquet_schema(path)
        if missing := [c for c in columns if c not in found]:
            raise BadInput(
                str(path), came=f"no {', '.join(missing)}", expected=f"columns {', '.join(columns)}", fix=_FIX
            )
        for name, kind in columns.items():
            if found[name] != kind:
                raise BadInput(f"{path}, column {name}", came=str(found[name]), expected=str(kind), fix=_FIX)
        return pl.read_parquet(path, columns=list(columns))
    except (pl.exceptions.PolarsError, OSError) as error:
        fix = "Copy or download it again."
        raise BadInput(str(path), came=str(error), expected="Parquet written to the end", fix=fix) from error


def parse(frame: pl.DataFrame, path: Path, values: Mapping[str, tuple[pl.Expr, str]]) -> pl.DataFrame:
    """Replace string columns by their parsed values; values: {column: (expression of it, what was expected)}.

    The expression gives null for what it cannot read. An absent (null) cell stays null.
    Raises: BadInput naming file, line and column of the first cell that cannot be read.
    """
    parsed = frame.with_columns(expression.alias(column) for column, (expression, _) in values.items())
    for column, (_, expected) in values.items():
        bad = parsed[column].is_null() & frame[column].is_not_null()
        if bad.any():
            at = int(bad.arg_max() or 0)
            more = f" ({bad.sum()} such cells)" if bad.sum() > 1 else ""
            raise BadInput(
                f"{path}, line {frame[LINE][at]}, column {column}",
                came=f"{frame[column][at]!r}{more}",
                expected=expected,
                fix=_FIX,
            )
    return parsed


def require(frame: pl.DataFrame, path: Path, columns: Sequence[str]) -> None:
    """Raise BadInput at the first row without a value in one of the columns (a line cut off in the middle)."""
    for column in columns:
        if frame[column].null_count():
            at = int(frame[column].is_null().arg_max() or 0)
            raise BadInput(
                f"{path}, line {frame[LINE][at]}, column {column}", came="nothing", expected="a value", fix=_FIX
            )


def split(frame: pl.DataFrame, path: Path, rules: Mapping[str, pl.Expr]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(kept, rejected): a row is rejected with the name of the first rule that is true for it."""
    cause = pl.coalesce(pl.when(rule).then(pl.lit(name)) for name, rule in rules.items())
    marked = frame.with_columns(cause.alias("cause"))
    rejected = marked.filter(pl.col("cause").is_not_null()).select(
        pl.lit(path.name).alias("file"),
        pl.col(LINE),
        "cause",
        pl.struct(pl.exclude(LINE, "cause").cast(pl.String)).struct.json_encode().alias("row"),
    )
    return marked.filter(pl.col("cause").is_null()).drop("cause"), rejected


def event_ids(mark: str) -> pl.Expr:
    """event_id = fingerprint of the source and line."""
    return pl.format("{}-{}", pl.lit(mark), pl.col(LINE)).alias("event_id")


def epoch(column: str, unit: str) -> tuple[pl.Expr, str]:
    """Parser of a whole number of "s" or "ms" since 1970, UTC."""
    factor = {"s": 1_000_000, "ms": 1_000}[unit]
    whole = pl.col(column).cast(pl.Int64, strict=False)
    inside = whole.is_between(-62_135_596_800 * 1_000_000 // factor, 253_402_300_799 * 1_000_000 // factor)
    expression = (pl.when(inside).then(whole) * factor).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    return expression, f"whole {'milli' if unit == 'ms' else ''}seconds since 1970"


def bad_ids(*columns: str) -> pl.Expr:
    """Rule: one of the id columns (user_id and item_id unless named) is empty or longer than 256 bytes."""
    return pl.any_horizontal(~pl.col(c).str.len_bytes().is_between(1, ID_BYTES_MAX) for c in columns or _ID_COLUMNS)


def bad_time(*columns: str) -> pl.Expr:
    """Rule: one of the time columns is not after 1970-01-01 or not before 2100: no date, and the log takes none such.

    One event at zero, which means "not known", would stretch the data's span by decades and every window with it.
    """
    times = (pl.col(c).dt.timestamp("us") for c in columns)
    return pl.any_horizontal(~time.is_between(0, TIME_US_MAX, closed="none") for time in times)


def minor_units(amount: pl.Expr) -> pl.Expr:
    """Money in major units (2.55) as minor units (255), rounded to the nearest."""
    return (amount * 100).round().cast(pl.Int64)


def loggable(items: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Items without the values that the log takes none such of; (items, how many were left out, by column)."""
    fits = {c: pl.col(c).str.len_bytes() <= bytes_max for c, bytes_max in _ITEM_BYTES_MAX.items() if c in items.columns}
    if "price" in items.columns:
        fits["price"] = pl.col("price").is_between(0, AMOUNT_MAX)
    kept = items.with_columns(pl.when(fit).then(pl.col(c)).alias(c) for c, fit in fits.items())
    counts = {c: kept[c].null_count() - items[c].null_count() for c in fits}
    return kept, {c: count for c, count in counts.items() if count}


def items_from_events(events: pl.DataFrame, first: Sequence[str] = ()) -> pl.DataFrame:
    """One row per item: available_from = time of its first event, `first` = that column's first known value.

    Events must be in time order.
    """
    known = [pl.col(c).drop_nulls().first() for c in first]
    items = events.group_by("item_id", maintain_order=True)
    return items.agg(pl.col("event_time").first().alias("available_from"), *known)
