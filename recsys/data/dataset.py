"""Dataset: a dataset directory, opened. What everything offline reads.

DIR/dataset.json      source, format, licence, counts, static_catalogue, hash
DIR/events.parquet    what shoppers did, in time order      (or events/day=YYYY-MM-DD/*.parquet, an archive that grows)
DIR/items.parquet     the catalogue as first known        (or items/*.parquet, of an archive: what each worker has seen)
DIR/catalog.parquet   listings, prices, stock by time (optional; or catalog/day=.../)
DIR/users.parquet     optional
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from recsys.core.errors import BadInput, CorruptData, NotFound
from recsys.core.events import EventBatch
from recsys.core.ids import unique_by_key
from recsys.core.items import ItemTable
from recsys.core.logging import get_logger
from recsys.data import batches, schema
from recsys.data.write import content_hash
from streaming.archive import read_items

_log = get_logger(__name__)
_IMPORT_FIX = "Check and convert it: double11 data import --format canonical DIR --out NEW"


class Dataset:
    """Use `open`. Frames are read from disk at each call; nothing but dataset.json is kept in memory."""

    def __init__(self, root: Path, info: dict[str, Any]) -> None:
        self.root, self.info = root, info
        self._columns: dict[str, dict[str, pl.DataType]] = {}  # of each table, the union over its files

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Open a dataset directory and check the columns of its files.

        Raises: NotFound when there is no dataset.json or no events; CorruptData for JSON or Parquet that does not
        parse; BadInput for missing columns or other types than the contract's.
        """
        root = Path(path)
        if not (root / "dataset.json").is_file():
            raise NotFound(
                f"dataset {root}",
                came="no dataset.json",
                expected="a dataset directory",
                fix="Make one: double11 data import --format F SRC --out DIR",
            )
        try:
            info = json.loads((root / "dataset.json").read_text("utf-8"))
        except ValueError as error:
            raise CorruptData(f"{root}/dataset.json", came=str(error), expected="JSON", fix="Import again.") from error
        if not isinstance(info, dict):
            raise CorruptData(f"{root}/dataset.json", came="no object", expected="a JSON object", fix="Import again.")
        dataset = cls(root, info)
        dataset._check("events", schema.EVENT_COLUMNS, schema.EVENT_REQUIRED, needed=True)
        dataset._check("items", schema.ITEM_COLUMNS, schema.ITEM_REQUIRED, needed=True)
        dataset._check("catalog", schema.CATALOG_COLUMNS, schema.CATALOG_REQUIRED, needed=False)
        dataset._check("users", schema.USER_COLUMNS, schema.USER_REQUIRED, needed=False)
        return dataset

    def verify(self) -> str:
        """Read every file and compare with the hash of dataset.json, which is returned.

        Raises: CorruptData for other bytes; BadInput for a directory without a hash (an archive, or made by others).
        """
        said = self.info.get("hash")
        if not said:
            raise BadInput(
                f"dataset {self.root}",
                came="a dataset.json without a hash: an archive that grows, or made by others",
                expected="one that an import or a simulation has written",
                fix=f"Check and convert it: double11 data import --format canonical {self.root} --out NEW",
            )
        if (found := content_hash(self.root)) != said:
            raise CorruptData(
                f"dataset {self.root}",
                came=f"files of hash {found[:12]}",
                expected=f"{str(said)[:12]}, as dataset.json says",
                fix="Copy or import it again; changed on purpose: " + _IMPORT_FIX.replace("DIR", str(self.root)),
            )
        return found

    @property
    def static_catalogue(self) -> bool:
        """True when items have no listing times because the catalogue never changed."""
        return bool(self.info.get("static_catalogue", False))

    @cached_property
    def hash(self) -> str:
        """Hash of the data files: dataset.json's, else (an archive, a directory made or cut by others) computed once.

        Rows are counted, bytes are not compared: that is `verify`.
        """
        said = self.info.get("hash")
        if said and not self._is_as_counted():
            _log.warning("dataset_changed", directory=str(self.root), fix="rows differ from dataset.json: hashed anew")
            said = None
        return str(said or content_hash(self.root))

    @cached_property
    def num_events(self) -> int:
        """Rows of events."""
        return int(self._scan("events").select(pl.len()).collect().item())

    @property
    def first_event_us(self) -> int:
        """Earliest event time, microseconds UTC."""
        return self._span_us[0]

    @property
    def last_event_us(self) -> int:
        """Latest event time, microseconds UTC."""
        return self._span_us[1]

    @property
    def last_change_us(self) -> int:
        """Latest time of an event or a catalogue change, microseconds UTC: what `event_batches` ends with."""
        changes = batches.catalogue_changes(self.items(), self.catalog(), static_us=self.first_event_us - 1)
        return max(self.last_event_us, int(changes.numpy("event_time").max(initial=0)))

    def events(
        self,
        *,
        before_us: int | None = None,
        from_us: int | None = None,
        known_before_us: int | None = None,
        types: Sequence[str] | None = None,
    ) -> pl.DataFrame:
        """Events in [from_us, before_us) of the given types, sorted by event_time, ties in source order.

        known_before_us: only those that had happened and were known strictly before it (known_at; null = at once).
        Columns: event_id, user_id, item_id, event_type (str), event_time (Datetime[us, UTC]) and the optional ones that
        are present. Row groups outside the time range are not read.
        Raises: BadInput for an unknown event type.
        """
        if types is not None and (unknown := sorted(set(types) - set(schema.EVENT_TYPES))):
            raise BadInput("event types", came=unknown, expected=f"some of {schema.EVENT_TYPES}", fix="Correct them.")
        scan = self._scan("events")
        if known_before_us is not None:
            before_us = known_before_us if before_us is None else min(before_us, known_before_us)
            if "known_at" in self._columns["events"]:
                scan = scan.filter((pl.col("known_at") < at(known_before_us)) | pl.col("known_at").is_null())
        if before_us is not None:
            scan = scan.filter(pl.col("event_time") < at(before_us))
        if from_us is not None:
            scan = scan.filter(pl.col("event_time") >= at(from_us))
        if types is not None:
            scan = scan.filter(pl.col("event_type").is_in(list(types)))
        return (batches.delivered_once(scan) if self._is_folder("events") else scan).collect()

    def items(self) -> pl.DataFrame:
        """Each item once, every optional column present (null where unknown)."""
        frame = read_items(self.root) if self._is_folder("items") else self._scan("items").collect()
        absent = [pl.lit(None, t).alias(c) for c, t in schema.ITEM_COLUMNS.items() if c not in frame.columns]
        return frame.with_columns(absent).select(schema.ITEM_COLUMNS.keys())

    def catalog(self) -> pl.DataFrame | None:
        """catalog.parquet sorted by event_time, or None where the dataset has none."""
        if not self._files("catalog"):
            return None
        frame = self._scan("catalog").collect()
        absent = [pl.lit(None, t).alias(c) for c, t in schema.CATALOG_COLUMNS.items() if c not in frame.columns]
        frame = frame.with_columns(absent).unique("event_id", keep="first", maintain_order=True)
        return frame.sort("event_time", maintain_order=True)

    def users(self) -> pl.DataFrame | None:
        """users.parquet, or None where the dataset has none."""
        return self._scan("users").collect() if self._files("users") else None

    def item_table(self, before_us: int | None = None) -> ItemTable:
        """Items with available_from < before_us (or null: a static catalogue), keyed.

        Of two ids with one key the one with the smaller id string stays; the other is logged and left out.
        """
        frame = self.items()
        if before_us is not None:
            frame = frame.filter((pl.col("available_from") < at(before_us)) | pl.col("available_from").is_null())
        kept, item_key, rejected = unique_by_key(frame.sort("item_id")["item_id"].to_list())
        if rejected:
            _log.warning("item_key_collision", rejected=len(rejected), first=rejected[0])
        keyed = pl.DataFrame(
            {"item_id": kept, "item_key": item_key}, schema={"item_id": pl.String, "item_key": pl.Int64}
        )
        frame = keyed.join(frame, on="item_id", how="left", maintain_order="left")
        frame = frame.with_columns(pl.col("available_from").dt.timestamp("us"))
        table = frame.to_arrow()
        return ItemTable.from_table(table.cast(pa.schema([_plain(f) for f in table.schema])))

    def event_batches(
        self,
        *,
        before_us: int | None = None,
        from_us: int | None = None,
        known_before_us: int | None = None,
        rows_max: int = 65_536,
        include_catalog: bool = True,
    ) -> Iterator[EventBatch]:
        """Everything that happened in [from_us, before_us) in event-time order, at most rows_max rows a batch.

        Catalogue changes come before actions of the same time: each item is one ITEM event (listed, with its text and
        price) at available_from, in a static catalogue one microsecond before the first event; catalog.parquet adds
        later listings, delistings, prices and stock, and has the say at that time. known_before_us: as for `events`.
        """
        if known_before_us is not None:
            before_us = known_before_us if before_us is None else min(before_us, known_before_us)
        changes = None
        if include_catalog:
            changes = batches.catalogue_changes(self.items(), self.catalog(), static_us=self.first_event_us - 1)
        if self._is_folder("events"):
            actions = batches.archived_actions(self._files("events"), self._read, before_us, from_us, rows_max)
        else:
            actions = batches.ordered_actions(self.root / "events.parquet", before_us, from_us, rows_max)
        for batch in batches.merge(actions, changes, before_us=before_us, from_us=from_us, rows_max=rows_max):
            known = batch if known_before_us is None else batch.filter(batch.numpy("known_at") < known_before_us)
            if len(known):
                yield known

    @cached_property
    def _span_us(self) -> tuple[int, int]:
        time = pl.col("event_time").dt.timestamp("us")
        first, last = self._scan("events").select(time.min().alias("first"), time.max().alias("last")).collect().row(0)
        if first is None:
            raise BadInput(f"dataset {self.root}", came="no event", expected="at least one", fix="Import again.")
        return int(first), int(last)

    def _is_folder(self, name: str) -> bool:
        return (self.root / name).is_dir()

    def _files(self, name: str) -> list[Path]:
        if self._is_folder(name):
            files = (self.root / name).glob("*.parquet" if name == "items" else "day=*/*.parquet")
            return sorted(files, key=_arrival)
        file = self.root / f"{name}.parquet"
        return [file] if file.is_file() else []

    def _scan(self, name: str) -> pl.LazyFrame:
        return self._read(self._files(name), name)

    def _read(self, files: list[Path], name: str = "events") -> pl.LazyFrame:
        """Files of one table: columns that only some have are null in the others, the contract's are all there is."""
        return pl.scan_parquet(
            files,
            schema=self._columns[name],
            hive_partitioning=False,
            missing_columns="insert",
            extra_columns="ignore",
        )

    def _is_as_counted(self) -> bool:
        """Whether there are as many rows as dataset.json says, if it says so; reads footers only."""
        counts = {name: self.info.get(counted) for name, counted in (("events", "num_events"), ("items", "num_items"))}
        scans = {name: self._scan(name).select(pl.len()) for name, said in counts.items() if said is not None}
        return all(scan.collect().item() == counts[name] for name, scan in scans.items())

    def _check(self, name: str, columns: Mapping[str, pl.DataType], required: tuple[str, ...], *, needed: bool) -> None:
        files = self._files(name)
        if needed and not files:
            raise NotFound(
                f"dataset {self.root}",
                came=f"no {name}.parquet",
                expected=f"{name}.parquet or {name}/day=YYYY-MM-DD/*.parquet",
                fix="Import again: the directory is not whole.",
            )
        union: set[str] = set()
        for file in files:
            try:
                found = pl.read_parquet_schema(file)
            except (pl.exceptions.PolarsError, OSError) as error:
                raise CorruptData(
                    str(file), came=str(error), expected="Parquet written to the end", fix="Copy or import it again."
                ) from error
            if missing := [c for c in required if c not in found]:
                raise BadInput(
                    f"{file}", came=f"no {', '.join(missing)}", expected=f"{tuple(columns)}", fix=_IMPORT_FIX
                )
            for column, kind in found.items():
                if column in columns and kind != columns[column]:
                    raise BadInput(
                        f"{file}, column {column}", came=str(kind), expected=str(columns[column]), fix=_IMPORT_FIX
                    )
            union |= set(found)
        self._columns[name] = {c: kind for c, kind in columns.items() if c in union}


def at(time_us: int) -> pl.Expr:
    """A time as a literal that Parquet statistics can be compared with."""
    return pl.lit(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us), schema.TIME)


def _arrival(file: Path) -> tuple[str, list[tuple[int, str]]]:
    """Day by day, then as an archive numbers its files: offsets 5 to 8 come before 13 to 16."""
    return file.parent.name, [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", file.name)]


def _plain(field: pa.Field) -> pa.Field:
    is_text = pa.types.is_large_string(field.type) or pa.types.is_string_view(field.type)
    return pa.field(field.name, pa.string() if is_text else field.type)
