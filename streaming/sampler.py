"""The sampler: labelled samples from the archive, as the windows of impressions close.

Event time is cut into slices. When the watermark has passed a slice's end and the attribution window, the slice is
joined from the archive's rows, written to the offline store, sent to the `samples` topic, and only then the position
moves: at least once, under ids that follow from the impression, so that readers drop repeats. The position is beside
the samples, not in the online store: samples follow from the archive alone, and a store that is lost and rebuilt is no
reason to send them all again. An action or a slate that comes when its slice is closed joins its slots again, and they
are sent as late: they replace what was sent. What marks a stress test is not archived, so it gives no samples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from feature_store.offline.samples import by_day
from recsys.core import Clock, EventKind, WallClock, logging, metrics
from streaming.archive import Archive, Part
from streaming.archive.files import EVENTS, SHOWN, Writes
from streaming.archive.window import actions, first_times, next_day_us
from streaming.config import SamplesConfig
from streaming.join import join_actions, to_messages
from streaming.log.base import SCHEMA_HEADER, SCHEMA_VERSION, Producer
from streaming.watermark import Watermark

_log = logging.get_logger(__name__)
_PAIR = ("user_id", "item_id", "event_time")
_HEADERS = {SCHEMA_HEADER: SCHEMA_VERSION}


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Of one partition. closed_us: impressions before it have been joined. examined: by source, the archive's offset up
    to which rows have been looked at for being late. late_files: how many have been written.
    """

    closed_us: int = 0
    examined: Mapping[str, int] = field(default_factory=dict)
    late_files: int = 0


class Sampler:
    """Joins the impressions of the partitions that its job reads; driven by the job, a bounded round at a time."""

    def __init__(
        self,
        archive: Archive,
        root: Path,
        producer: Producer,
        topic: str,
        config: SamplesConfig | None = None,
        *,
        clock: Clock | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """root: the offline store. producer: flushed before a position moves."""
        self._archive, self._root, self._producer, self._topic = archive, root, producer, topic
        self._config, self._clock, self._monotonic_s = config or SamplesConfig(), clock or WallClock(), monotonic_s
        self._window_us = int(self._config.window_s * 1e6)
        self._watermark = Watermark(idle_s=self._config.idle_s, monotonic_s=monotonic_s)
        self._heard_s = monotonic_s()
        self._positions: dict[int, Position] = {}
        self._late: dict[int, list[pl.DataFrame]] = {}
        self._late_due_s = 0.0

    def take(self, partitions: Sequence[int]) -> None:
        """Begin with some partitions, after the archive has taken their sources."""
        for p in partitions:
            position = self._positions[p] = self._load(p)
            for path in (self._root / "samples").glob(f"day=*/{p}-*.parquet"):
                if int(path.stem.split("-")[1]) >= position.closed_us:
                    path.unlink(missing_ok=True)  # of a round that did not end; the next may be cut otherwise
            for prefix in (EVENTS, SHOWN):
                self._watermark.observe(prefix, p, position.closed_us + self._window_us)
            self._late[p] = []
            if position.closed_us:
                columns = (*_PAIR, "event_type")
                upto_us = position.closed_us + self._window_us
                new = actions(self._archive, [p], to_us=upto_us, since=dict(position.examined), columns=columns)
                self._add_late(p, new)

    def leave(self, partitions: Sequence[int]) -> None:
        """Another worker takes them; it finds by their positions what has not been done."""
        for p in partitions:
            self._positions.pop(p, None)
            self._late.pop(p, None)
            for prefix in (EVENTS, SHOWN):
                self._watermark.forget(prefix, p)

    def took(self, parts: Sequence[Part]) -> None:
        """Look at what the archive has just taken: how far event time is, and what comes late for closed slots."""
        for part in parts:
            if part.prefix not in (EVENTS, SHOWN) or part.partition not in self._positions:
                continue
            self._heard_s = self._monotonic_s()
            time_us = part.batch.numpy("event_time")
            # A shopper's clock that is ahead must not close the windows of others.
            newest_us = min(int(time_us.max(initial=0)), part.append_us)
            self._watermark.observe(part.prefix, part.partition, newest_us)
            closed_us = self._positions[part.partition].closed_us
            if len(time_us) and closed_us and int(time_us.min()) < (upto_us := closed_us + self._window_us):
                # What is marked late was not accepted: it may be a repeat, and is not a label.
                acted = (part.batch.numpy("kind") == int(EventKind.ACTION)) & ~part.batch.numpy("late")
                rows = part.batch.filter(acted & (time_us < upto_us))
                frame = pl.from_arrow(rows.table.select([*_PAIR, "event_type"]))
                assert isinstance(frame, pl.DataFrame)
                self._add_late(part.partition, frame)

    def run(self) -> bool:
        """Join what is due; whether there was anything. Partitions that are equally far are joined together."""
        target_us, now_s = self._target_us(), self._monotonic_s()
        late_is_due = now_s >= self._late_due_s
        due = [
            p
            for p, position in self._positions.items()
            if position.closed_us < target_us or (late_is_due and self._late[p])
        ]
        if not due:
            return False
        if late_is_due:
            self._late_due_s = now_s + self._config.late_s
        closed_us = min(self._positions[p].closed_us for p in due)
        self._round([p for p in due if self._positions[p].closed_us == closed_us], target_us)
        return True

    def _target_us(self) -> int:
        """Up to where slices are over."""
        watermark_us = self._watermark.value_us() or 0
        idle_s = self._config.idle_s
        if self._monotonic_s() - self._heard_s > idle_s:  # nothing more is on its way
            watermark_us = max(watermark_us, self._clock.now_us() - int(idle_s * 1e6))
        slice_us = self._config.slice_us
        return (watermark_us - int(self._config.grace_s * 1e6) - self._window_us) // slice_us * slice_us

    def _round(self, due: Sequence[int], target_us: int) -> None:
        """Late labels, and the next slices, of partitions that have the same `closed_us`."""
        closed_us = self._positions[due[0]].closed_us
        late = self._joined_late(due, closed_us)
        due, end_us, samples = self._joined(due, closed_us, target_us)
        writes, moved = Writes(), {}
        for p in due:
            mine, again = _of_partition(samples, p), _of_partition(late, p)
            number = self._positions[p].late_files + (1 if len(again) else 0)
            files = by_day(again, self._root, f"late-{p}-{number:012d}", late=True) if len(again) else {}
            files |= by_day(mine, self._root, f"{p}-{closed_us}-{end_us}") if len(mine) else {}
            for path, rows in files.items():
                writes.parquet(path, rows)
            examined = {s: self._archive.end(s) for s in (f"{EVENTS}{p}", f"{SHOWN}{p}")}
            moved[p] = Position(closed_us=end_us, examined=examined, late_files=number)
        late = late.filter(_partition().is_in(due)) if len(late) else late
        writes.commit()
        for frame, is_late in ((samples, False), (late, True)):
            for message in to_messages(frame, late=is_late):
                self._producer.send(self._topic, message.user_id.encode(), message.SerializeToString(), _HEADERS)
            metrics.SAMPLES.labels("late" if is_late else "closed").inc(len(frame))
        if len(samples) or len(late):
            self._producer.flush()
        self._positions |= moved
        for p in due:
            self._late[p] = []
            if len(samples) or len(late) or not closed_us:  # what had nothing in it can be looked at again
                self._save(writes, p)
        writes.commit()

    def _joined(self, due: Sequence[int], closed_us: int, target_us: int) -> tuple[Sequence[int], int, pl.DataFrame]:
        """Samples of the next slices, as many as fit; of which partitions (one of them, if all do not fit), and where
        they end.
        """
        none, slice_us, rows_max = pl.DataFrame(), self._config.slice_us, self._config.rows_max
        if target_us <= closed_us:
            return due, closed_us, none
        end_us = target_us
        if target_us - closed_us > slice_us:  # behind: day by day, and so many impressions at once
            day_us = next_day_us(self._archive.root, closed_us)
            end_us = min(target_us, max(day_us // slice_us * slice_us, closed_us + slice_us)) if day_us else target_us
        times = first_times(self._archive, due, from_us=closed_us, to_us=end_us, number=rows_max + 1)
        if len(times) > rows_max and len(due) > 1:
            due = due[:1]
            times = first_times(self._archive, due, from_us=closed_us, to_us=end_us, number=rows_max + 1)
        if not times:
            return due, end_us, none
        if len(times) > rows_max:
            end_us = max(times[-1] // slice_us * slice_us, (times[0] // slice_us + 1) * slice_us)
        shown = actions(
            self._archive, due, from_us=closed_us, to_us=end_us, columns=("user_id",), types=("impression",)
        )
        return due, end_us, self._of(due, shown["user_id"].unique().to_list(), closed_us, end_us)

    def _of(self, due: Sequence[int], users: list[str], from_us: int, to_us: int) -> pl.DataFrame:
        """Samples of some users' impressions of [from_us, to_us). An action may name a slate of the window before."""
        early_us, late_us = max(from_us - self._window_us, 0), to_us + self._window_us
        rows = actions(self._archive, due, from_us=early_us, to_us=late_us, users=users)
        samples = join_actions(rows, window_us=self._window_us)
        return samples.filter(pl.col("event_time_us").is_between(from_us, to_us, closed="left"))

    def _add_late(self, p: int, rows: pl.DataFrame) -> None:
        """Keep what concerns slots that are closed: actions within a window of one, slates before the end."""
        if len(rows):
            self._late[p].append(rows.select(_PAIR))

    def _joined_late(self, due: Sequence[int], closed_us: int) -> pl.DataFrame:
        """The closed slots that a late action or slate of their user and item may have changed."""
        rows = [frame for p in due for frame in self._late[p]]
        if not rows:
            return pl.DataFrame()
        late = pl.concat(rows).unique()
        first_us, last_us = int(late["event_time"].min()) - self._window_us, int(late["event_time"].max())  # type: ignore[arg-type]
        upto_us = min(last_us + 1, closed_us)
        if upto_us <= first_us:
            return pl.DataFrame()
        samples = self._of(due, late["user_id"].unique().to_list(), max(first_us, 0), upto_us)
        touched = samples.join(late.rename({"event_time": "at"}), on=["user_id", "item_id"], how="inner")
        ago = pl.col("at") - pl.col("event_time_us")
        ids = touched.filter(ago.is_between(0, self._window_us))["sample_id"].unique()
        return samples.filter(pl.col("sample_id").is_in(ids.implode()))

    def _load(self, p: int) -> Position:
        path = self._path(p)
        return Position(**json.loads(path.read_text("utf-8"))) if path.is_file() else Position()

    def _save(self, writes: Writes, p: int) -> None:
        position = self._positions[p]
        document = {
            "closed_us": position.closed_us,
            "examined": dict(position.examined),
            "late_files": position.late_files,
        }
        writes.text(self._path(p), json.dumps(document) + "\n")

    def _path(self, p: int) -> Path:
        return self._root / "samples" / "position" / f"{p}.json"


def _partition() -> pl.Expr:
    """Partition of a sample's impression."""
    return pl.col("source").str.strip_prefix(SHOWN).cast(pl.Int64)


def _of_partition(samples: pl.DataFrame, partition: int) -> pl.DataFrame:
    return samples.filter(_partition() == partition) if len(samples) else samples
