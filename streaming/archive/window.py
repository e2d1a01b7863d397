"""Actions of some partitions' users in a stretch of event time, wherever the archive has them now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from recsys.core.events import EVENT_TYPE_BY_LABEL
from streaming.archive.files import EVENTS, SHOWN, Span, found, split
from streaming.archive.tombstones import tombstones, without
from streaming.archive.writer import WAITING, Archive

_DAY_US = 86_400_000_000
_TYPES = {label: int(t) for label, t in EVENT_TYPE_BY_LABEL.items()}


def actions(
    archive: Archive,
    partitions: Sequence[int],
    *,
    from_us: int = 0,
    to_us: int,
    since: dict[str, int] | None = None,
    users: list[str] | None = None,
    columns: tuple[str, ...] = WAITING,
    types: tuple[str, ...] = tuple(_TYPES),
) -> pl.DataFrame:
    """Accepted actions and impressions of [from_us, to_us), each id once: event_time in microseconds, event_type its
    number. users: only theirs. since: by source, only from these offsets on. Users' rows behind a tombstone are left
    out. Row groups outside the time range are not read.
    """
    sources = _sources(partitions)
    waiting, forgets = archive.waiting(sources)
    rows = _scan(archive.root, waiting, sources, from_us, to_us, since or {})
    rows = rows.filter(pl.col("event_type").is_in([_TYPES[t] for t in types]))
    if users is not None:
        rows = rows.filter(pl.col("user_id").is_in(users))
    for source, first in (since or {}).items():
        rows = rows.filter((pl.col("source") != source) | (pl.col("offset") >= first))
    needed = [c for c in WAITING if c in {*columns, "event_id", "user_id", "event_time", "source", "offset"}]
    frame = without(rows.select(needed).collect(), tombstones(archive.root, forgets))
    return frame.unique("event_id", keep="first", maintain_order=True).select(columns)


def first_times(archive: Archive, partitions: Sequence[int], *, from_us: int, to_us: int, number: int) -> list[int]:
    """The smallest event times of impressions in [from_us, to_us), at most `number`, ascending."""
    sources = _sources(partitions)
    rows = _scan(archive.root, archive.waiting(sources)[0], sources, from_us, to_us, {})
    shown = rows.filter(pl.col("event_type") == _TYPES["impression"]).select("event_time")
    return shown.bottom_k(number, by="event_time").collect()["event_time"].sort().to_list()


def next_day_us(root: Path, from_us: int) -> int:
    """End of the first day, from a time on, that the archive has files of; 0 when there is none."""
    days = sorted(p.name.removeprefix("day=") for p in (root / "events").glob("day=*"))
    day = next((d for d in days if d >= _day(from_us)), None)
    return 0 if day is None else _us(datetime.fromisoformat(day)) + _DAY_US


def _scan(
    root: Path, waiting: pl.DataFrame, sources: Sequence[str], from_us: int, to_us: int, since: Mapping[str, int]
) -> pl.LazyFrame:
    """Rows of a stretch of time, of the journal and of every file that has some; columns WAITING."""
    parts = [waiting.lazy().filter(pl.col("event_time").is_between(from_us, to_us, closed="left"))]
    whole, _ = split(found(root, "events", _day(from_us), _day(to_us)))
    number = pl.col("event_type").replace_strict(_TYPES, return_dtype=pl.Int8)
    for source in sources:
        first = since.get(source, 0)
        files = [p for p in whole if (span := Span.of(p)).source == source and span.last >= first]
        files = [p for p in files if _overlaps(p, from_us, to_us)]
        if files:
            scan = pl.scan_parquet(files, hive_partitioning=False)
            scan = scan.filter(pl.col("event_time").is_between(_time(from_us), _time(to_us), closed="left"))
            scan = scan.with_columns(pl.col("event_time").dt.timestamp("us"), number, source=pl.lit(source))
            parts.append(scan.select(WAITING))
    return pl.concat(parts)


def _sources(partitions: Sequence[int]) -> list[str]:
    return [f"{prefix}{p}" for prefix in (EVENTS, SHOWN) for p in partitions]


def _overlaps(path: Path, from_us: int, to_us: int) -> bool:
    first, last = _times_us(path, path.stat().st_mtime_ns)
    return first < to_us and last >= from_us


@lru_cache(maxsize=1 << 14)
def _times_us(path: Path, _mtime_ns: int) -> tuple[int, int]:
    """First and last event time of a file, from its footer."""
    metadata = pq.read_metadata(path)
    column = metadata.schema.names.index("event_time")
    groups = [metadata.row_group(i).column(column).statistics for i in range(metadata.num_row_groups)]
    if not groups or any(g is None or not g.has_min_max for g in groups):
        return 0, 1 << 62
    return min(_us(g.min) for g in groups), max(_us(g.max) for g in groups)


def _us(time: datetime) -> int:
    since = time.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _time(time_us: int) -> pl.Expr:
    return pl.lit(time_us).cast(pl.Datetime("us", "UTC"))


def _day(time_us: int) -> str:
    return datetime.fromtimestamp(max(min(time_us, 4_102_444_800_000_000), 0) // 1_000_000, UTC).strftime("%Y-%m-%d")
