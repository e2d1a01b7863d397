"""Writing a dataset directory: under a temporary name, then renamed; whole or absent, and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.errors import BadInput, Conflict
from recsys.core.run_dir import sha256_file
from recsys.data import schema

FORMAT_VERSION = 1
# files of a dataset directory, folders of an archive
_TABLES = ("events", "items", "catalog", "users", "changes", "forgotten")
_ROW_GROUP_ROWS = 1 << 18  # small enough that a time predicate skips most of a year, large enough to compress
_DICTIONARY = ["user_id", "item_id", "event_type", "session_id", "kind", "category", "brand", "cause", "file"]


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was written where. `rejected` counts source rows by cause."""

    out: Path
    format: str
    num_events: int
    num_users: int
    num_items: int
    rejected: Mapping[str, int]
    hash: str

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "out": str(self.out), "rejected": dict(self.rejected)}


class DatasetWriter:
    """Context manager that collects a dataset directory and renames it on success.

    with DatasetWriter(out, info) as writer:
        writer.add_events(frame)   # any number of times, in time order
        writer.put_items(frame)
    writer.report                  # after the block
    """

    def __init__(self, out: Path | str, info: Mapping[str, Any]) -> None:
        """info: what dataset.json says beside counts and hash: format, source, licence, static_catalogue, ...

        Raises: Conflict when `out` exists.
        """
        self.out, self.info = Path(out), dict(info)
        if self.out.exists():
            raise Conflict(
                f"dataset {out}", came="it exists", expected="a new path", fix="Choose another --out or remove it."
            )
        self.report: ImportReport | None = None
        self.root = Path()
        self._events: pq.ParquetWriter | None = None
        self._num_events = 0
        self._last_time: Any = None
        self._users: list[pl.Series] = []
        self._num_items = 0
        self._rejected: list[pl.DataFrame] = []

    def __enter__(self) -> DatasetWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".tmp", dir=self.out.parent))
        return self

    def add_events(self, events: pl.DataFrame) -> None:
        """Append events; each call starts at or after the end of the one before.

        Raises: BadInput when a row is earlier than the one before it or the columns differ from the first call's.
        """
        events = schema.conform(events, schema.EVENT_COLUMNS, schema.EVENT_REQUIRED, "events")
        times = events["event_time"]
        if len(events) and (not times.is_sorted() or (self._last_time is not None and times[0] < self._last_time)):
            raise BadInput("events", came="an earlier event_time after a later one", expected="time order", fix="Sort.")
        table = _arrow(events, schema.EVENT_COLUMNS, schema.EVENT_REQUIRED)
        if self._events is None:
            self._events = _writer(self.root / "events.parquet", table.schema)
        self._events.write_table(table, row_group_size=_ROW_GROUP_ROWS)
        self._num_events += len(events)
        if len(events):
            self._last_time = times[-1]
            self._users.append(events["user_id"].unique())
        if len(self._users) > 16:
            self._users = [pl.concat(self._users).unique()]

    def put_items(self, items: pl.DataFrame) -> None:
        """Write items.parquet, sorted by item_id.

        Raises: BadInput for a repeated item_id, or a null available_from in a catalogue that is not static.
        """
        items = schema.conform(items, schema.ITEM_COLUMNS, schema.ITEM_REQUIRED, "items").sort("item_id")
        if (repeated := items.filter(pl.col("item_id").is_duplicated())).height:
            raise BadInput(
                "items, column item_id", came=f"{repeated['item_id'][0]!r} twice", expected="unique", fix="Drop one."
            )
        undated = "available_from" not in items.columns or items["available_from"].null_count() > 0
        if undated and len(items) and not self.info.get("static_catalogue"):
            raise BadInput(
                "items, column available_from",
                came="null",
                expected="a time for every item, or static_catalogue: true in dataset.json",
                fix="Give catalogue times, or declare the catalogue static if it really is.",
            )
        self._num_items = len(items)
        self._put("items.parquet", items, schema.ITEM_COLUMNS, schema.ITEM_REQUIRED)

    def put_catalog(self, catalog: pl.DataFrame) -> None:
        """Write catalog.parquet, in time order (stable)."""
        catalog = schema.conform(catalog, schema.CATALOG_COLUMNS, schema.CATALOG_REQUIRED, "catalog")
        catalog = catalog.sort("event_time", maintain_order=True)
        self._put("catalog.parquet", catalog, schema.CATALOG_COLUMNS, schema.CATALOG_REQUIRED)

    def put_users(self, users: pl.DataFrame) -> None:
        """Write users.parquet, sorted by user_id."""
        users = schema.conform(users, schema.USER_COLUMNS, schema.USER_REQUIRED, "users").sort("user_id")
        self._put("users.parquet", users, schema.USER_COLUMNS, schema.USER_REQUIRED)

    def reject(self, rows: pl.DataFrame) -> None:
        """Set source rows aside: columns file, line, cause, row."""
        if len(rows):
            self._rejected.append(schema.conform(rows, schema.REJECTED_COLUMNS, ("cause",), "rejected"))

    def require_events(self) -> None:
        """Raise BadInput while there is no event, with the causes why rows were set aside."""
        if not self._num_events:
            causes = ", ".join(f"{cause} ({count})" for cause, count in self._rejected_counts().items())
            came = f"no event; rows set aside: {causes}" if causes else "no event"
            raise BadInput("events", came=came, expected="at least one", fix="Check the source and its options.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._events is not None:
            self._events.close()
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)  # renamed away when all went well

    def _finish(self) -> None:
        self.require_events()
        if self._rejected:
            self._put("rejected.parquet", pl.concat(self._rejected), schema.REJECTED_COLUMNS, ("cause",))
        counts = self._rejected_counts()
        num_users = pl.concat(self._users).n_unique()
        digest = content_hash(self.root)
        document = {
            "format_version": FORMAT_VERSION,
            "static_catalogue": False,
            **self.info,
            "num_events": self._num_events,
            "num_users": num_users,
            "num_items": self._num_items,
            "rejected": counts,
            "hash": digest,
        }
        (self.root / "dataset.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
        self.root.chmod(0o755)
        self.root.rename(self.out)
        self.report = ImportReport(
            self.out, str(self.info.get("format", "")), self._num_events, num_users, self._num_items, counts, digest
        )

    def _rejected_counts(self) -> dict[str, int]:
        """Rows set aside by cause."""
        if not self._rejected:
            return {}
        return dict(pl.concat(self._rejected).group_by("cause").len().sort("cause").iter_rows())

    def _put(
        self, name: str, frame: pl.DataFrame, columns: Mapping[str, pl.DataType], required: tuple[str, ...]
    ) -> None:
        table = _arrow(frame, columns, required)
        with _writer(self.root / name, table.schema) as writer:
            writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)


def write_dataset(
    out: Path | str,
    *,
    events: pl.DataFrame | Iterable[pl.DataFrame],
    items: pl.DataFrame,
    info: Mapping[str, Any],
    catalog: pl.DataFrame | None = None,
    users: pl.DataFrame | None = None,
    rejected: pl.DataFrame | None = None,
) -> ImportReport:
    """Write a dataset directory in one call; `events` is one frame or frames in time order.

    Raises: Conflict when `out` exists; BadInput without an event or where the frames break the contract.
    """
    with DatasetWriter(out, info) as writer:
        for frame in [events] if isinstance(events, pl.DataFrame) else events:
            writer.add_events(frame)
        if rejected is not None:
            writer.reject(rejected)
        writer.require_events()  # before the items: without events they may well lack their times
        writer.put_items(items)
        if catalog is not None:
            writer.put_catalog(catalog)
        if users is not None:
            writer.put_users(users)
    assert writer.report is not None
    return writer.report


def content_hash(root: Path) -> str:
    """SHA-256 over the names and SHA-256s of the data files, in name order.

    dataset.json, rejected rows and what others have put into the folder, such as reports, are left out.
    """
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.parquet")):
        if path.relative_to(root).parts[0].removesuffix(".parquet") in _TABLES:
            digest.update(f"{path.relative_to(root).as_posix()} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _arrow(frame: pl.DataFrame, columns: Mapping[str, pl.DataType], required: tuple[str, ...]) -> pa.Table:
    return frame.to_arrow().cast(schema.arrow_schema(columns, frame.columns, required))


def _writer(path: Path, arrow: pa.Schema) -> pq.ParquetWriter:
    dictionary = [c for c in _DICTIONARY if c in arrow.names]
    return pq.ParquetWriter(path, arrow, compression="zstd", use_dictionary=dictionary)
