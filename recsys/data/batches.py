"""From Parquet to EventBatch: actions read row group by row group, catalogue changes merged in by time. All Arrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.core.events import EVENT_SCHEMA, EVENT_TYPE_BY_LABEL, EventBatch, EventKind
from recsys.core.ids import keys

_TIME_US = pa.timestamp("us", tz="UTC")
_LABELS = pa.array(list(EVENT_TYPE_BY_LABEL), pa.string())
_TYPES = pa.array([int(t) for t in EVENT_TYPE_BY_LABEL.values()], pa.int8())
_ITEM_TEXT = ("title", "category", "brand", "attributes")


def ordered_actions(file: Path, before_us: int | None, from_us: int | None, rows_max: int) -> Iterator[EventBatch]:
    """Actions of [from_us, before_us) of a file in time order, at most rows_max rows each, streamed."""
    with pq.ParquetFile(file) as parquet:
        groups = [i for i in range(parquet.num_row_groups) if _overlaps(parquet, i, before_us, from_us)]
        columns = [c for c in parquet.schema_arrow.names if c in EVENT_SCHEMA.names]
        for batch in parquet.iter_batches(rows_max, row_groups=groups, columns=columns):
            yield from _cut(_as_batch(pa.Table.from_batches([batch])), before_us, from_us)


def archived_actions(
    files: list[Path],
    read: Callable[[list[Path]], pl.LazyFrame],
    before_us: int | None,
    from_us: int | None,
    rows_max: int,
) -> Iterator[EventBatch]:
    """As `ordered_actions`, of an archive: a day's files are freed of repeats and put in order, one day at a time."""
    for _, day in groupby(files, key=lambda f: f.parent):
        table = delivered_once(read(list(day))).collect().to_arrow()
        for batch in _cut(_as_batch(table), before_us, from_us):
            yield from batch.chunks(rows_max)


def delivered_once(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Rows of an archive in time order, ties as they arrived, each event once: a log delivers at least once.

    What was sent again too late stands there a second time, marked so: then the row that was accepted is the event.
    """
    if "late" in rows.collect_schema():
        rows = rows.sort(pl.col("late").fill_null(value=False), maintain_order=True)
    return rows.unique("event_id", keep="first", maintain_order=True).sort("event_time", maintain_order=True)


def catalogue_changes(items: pl.DataFrame, catalog: pl.DataFrame | None, *, static_us: int) -> EventBatch:
    """Items and catalog.parquet as ITEM, PRICE and STOCK events, by time; static_us dates items without a time.

    An item that catalog.parquet lists at available_from takes that listing, with the text of items.parquet; one that it
    delists then is listed a microsecond earlier, and one that it prices then is listed at that price. What was before
    1970 (the year of a book) is dated to its first microsecond: streaming takes no earlier time.
    """
    first = items.with_columns(
        event_time=pl.col("available_from").dt.timestamp("us").fill_null(static_us),
        kind=pl.lit("list"),
        event_id=pl.Series([f"item-{k:016x}" for k in keys(items["item_id"].to_list()).tolist()], dtype=pl.String),
    )
    if catalog is not None:
        listed = catalog.filter(pl.col("kind") == "list").select("item_id", available_from="event_time")
        later = catalog.with_columns(pl.col("event_time", "known_at").dt.timestamp("us"))
        text = items.select("item_id", *_ITEM_TEXT)
        later = later.join(text, on="item_id", how="left", maintain_order="left")
        later = later.with_columns(pl.when(pl.col("kind") == "list").then(pl.col(c)).alias(c) for c in _ITEM_TEXT)
        first = first.join(listed, on=["item_id", "available_from"], how="anti")
        # Of equal times a hash of the event id decides: what the catalogue says of a new item must not be up to that.
        at_once = later.join(first, on=["item_id", "event_time"], how="semi", maintain_order="left")
        gone = pl.col("item_id").is_in(at_once.filter(pl.col("kind") == "delist")["item_id"].implode())
        is_known = pl.col("known_at").is_null() | (pl.col("known_at") == pl.col("event_time"))
        priced = at_once.filter(is_known, kind="price").unique("item_id", keep="last", maintain_order=True)
        first = first.join(priced.select("item_id", told="price"), on="item_id", how="left", maintain_order="left")
        first = first.with_columns(pl.col("event_time") - gone.cast(pl.Int64), price=pl.coalesce("told", "price"))
        first = pl.concat([first.drop("told"), later], how="diagonal")
    is_item = pl.col("kind").is_in(["list", "delist"])
    kind = (
        pl.when(is_item).then(int(EventKind.ITEM)).when(pl.col("kind") == "price").then(int(EventKind.PRICE))
        .otherwise(int(EventKind.STOCK)).cast(pl.Int8)
    )  # fmt: skip
    frame = (
        first.drop("available_from")
        .with_columns(
            listed=pl.when(is_item).then(pl.col("kind") == "list"),
            kind=kind,
            known_at=pl.col("known_at").fill_null(pl.col("event_time"))
            if "known_at" in first
            else pl.col("event_time"),
        )
        .sort("event_time", maintain_order=True)
        .with_columns(pl.col("event_time", "known_at").clip(lower_bound=1))
    )
    return EventBatch.from_table(frame.to_arrow())


def merge(
    actions: Iterator[EventBatch],
    changes: EventBatch | None,
    *,
    before_us: int | None,
    from_us: int | None,
    rows_max: int,
) -> Iterator[EventBatch]:
    """Merge two streams in time order into batches of at most rows_max rows; changes first where times are equal."""
    pending = EventBatch.empty()
    if changes is not None:
        pending = EventBatch.concat(list(_cut(changes, before_us, from_us)))
    times = pending.numpy("event_time")
    done = 0
    for batch in actions:
        upto = int(np.searchsorted(times, batch.numpy("event_time")[-1], side="right"))
        if upto > done:
            both = EventBatch.concat([pending.slice(done, upto - done), batch])
            order = np.argsort(both.numpy("event_time"), kind="stable")  # changes come first in `both`, so in ties too
            batch, done = both.take(order), upto
        yield from batch.chunks(rows_max)
    yield from pending.slice(done, len(pending) - done).chunks(rows_max)


def _as_batch(table: pa.Table) -> EventBatch:
    """Rows of events.parquet in EVENT_SCHEMA."""
    columns: dict[str, Any] = {n: table.column(n) for n in table.column_names if n in EVENT_SCHEMA.names}
    labels = pc.cast(columns["event_type"], pa.string())
    columns["event_type"] = _TYPES.take(pc.index_in(labels, value_set=_LABELS).combine_chunks())
    columns["kind"] = pa.repeat(pa.scalar(int(EventKind.ACTION), pa.int8()), table.num_rows)
    if "known_at" in columns:
        columns["known_at"] = pc.coalesce(columns["known_at"], columns["event_time"])
    for flag in {"late", "stress"} & columns.keys():
        columns[flag] = pc.fill_null(columns[flag], False)
    return EventBatch.from_table(pa.table(columns))


def _cut(batch: EventBatch, before_us: int | None, from_us: int | None) -> Iterator[EventBatch]:
    """The rows of a time-ordered batch in [from_us, before_us), if any."""
    times = batch.numpy("event_time")
    start = 0 if from_us is None else int(np.searchsorted(times, from_us))
    end = len(batch) if before_us is None else int(np.searchsorted(times, before_us))
    if end > start:
        yield batch.slice(start, end - start)


def _overlaps(parquet: pq.ParquetFile, group: int, before_us: int | None, from_us: int | None) -> bool:
    """False where the row group's statistics say that nothing in it is in [from_us, before_us)."""
    column = parquet.schema_arrow.get_field_index("event_time")
    statistics = parquet.metadata.row_group(group).column(column).statistics
    if statistics is None or not statistics.has_min_max:
        return True
    low, high = (pa.scalar(v, _TIME_US).value for v in (statistics.min, statistics.max))
    return (before_us is None or low < before_us) and (from_us is None or high >= from_us)
