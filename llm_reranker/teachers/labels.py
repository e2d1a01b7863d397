"""Label files: what a teacher said, with prompt, model and cost, made once and reused.

A label file is a folder of Parquet parts, each written aside and renamed. The last part is written anew as judgements
come, after each one where they come slowly, so that a run that was killed loses little and goes on where it was. A
label belongs to a query, an item and the exact texts the teacher read: lists that were made again reuse the labels of
what has not changed.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from llm_reranker.lists import Lists
from llm_reranker.teachers.base import Judgement, Teacher
from recsys.core.errors import Conflict, CorruptData
from recsys.core.ids import key

SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("text_key", pa.int64(), nullable=False),  # of history and item text
        pa.field("log_odds", pa.float32()),  # null: the answer was of no use
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int64(), nullable=False),  # of the whole list, like the next two
        pa.field("completion_tokens", pa.int64(), nullable=False),
        pa.field("cost_usd", pa.float64(), nullable=False),
        pa.field("made_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
_LISTS_PER_PART = 32
_WRITING_SHARE = 0.05  # of the time, at most, but for whole parts: who labels in no time is not held up by a disk
_FIX = "Name another --labels folder, or remove this one to have the labels made again."


class LabelFile:
    """Labels of one teacher in one folder."""

    def __init__(self, folder: Path, teacher: str, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """clock: seconds. Raises: CorruptData for a damaged part; Conflict when the labels are another teacher's."""
        self.folder, self._teacher = folder, teacher
        self._labels: dict[tuple[str, str, int], float] = {}
        self._part: list[dict[str, Any]] = []  # of the last part, on disk but for the last so many lists
        self._part_path: Path | None = None
        self._part_lists = self._lists_new = 0
        self._clock, self._opened_s, self._writing_s = clock, clock(), 0.0
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("part-*.parquet")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._labels)

    def of(self, lists: Lists, query: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32] | None:
        """Log-odds float32 [n] of the rows, NaN where the teacher's answer was of no use; None when one is missing."""
        found = [self._labels.get(k) for k in _keys(lists, query, rows)]
        return None if any(x is None for x in found) else np.array(found, np.float32)

    def add(self, lists: Lists, query: int, rows: npt.NDArray[np.int64], said: Judgement) -> None:
        """Keep a judgement; it goes to disk as soon as writing takes little of the time."""
        now = datetime.now(UTC)
        for (query_id, item_id, text_key), value in zip(_keys(lists, query, rows), said.log_odds.tolist(), strict=True):
            self._labels[query_id, item_id, text_key] = value
            self._part.append(
                {
                    "query_id": query_id, "item_id": item_id, "text_key": text_key,
                    "log_odds": None if np.isnan(value) else value, "teacher": self._teacher, "prompt": said.prompt,
                    "prompt_tokens": said.prompt_tokens, "completion_tokens": said.completion_tokens,
                    "cost_usd": said.cost_usd, "made_at": now,
                }
            )  # fmt: skip
        self._part_lists, self._lists_new = self._part_lists + 1, self._lists_new + 1
        is_full = self._part_lists >= _LISTS_PER_PART
        if is_full or self._writing_s < _WRITING_SHARE * (self._clock() - self._opened_s):
            self.flush()
        if is_full:
            self._part, self._part_path, self._part_lists = [], None, 0

    def flush(self) -> None:
        """Write the last part, if there is anything in it that is not on disk yet."""
        if not self._lists_new:
            return
        started_s = self._clock()
        table = pa.Table.from_pylist(self._part, schema=SCHEMA)
        if self._part_path is None:
            # A random name: containers that share the folder have the same process ids.
            number = len(list(self.folder.glob("part-*.parquet")))
            self._part_path = self.folder / f"part-{number:06d}-{secrets.token_hex(4)}.parquet"
        temporary = self._part_path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())  # a name must not outlive a power cut that its bytes did not: they were paid for
        temporary.rename(self._part_path)
        self._lists_new = 0
        self._writing_s += self._clock() - started_s

    def _read(self, path: Path) -> None:
        try:
            table = pq.read_table(path).cast(SCHEMA)
        except (pa.ArrowInvalid, ValueError, OSError) as error:
            raise CorruptData(f"labels {path}", came=str(error), expected=f"{SCHEMA.names}", fix=_FIX) from error
        frame = pl.DataFrame(pl.from_arrow(table))
        if others := sorted(set(frame["teacher"].unique().to_list()) - {self._teacher}):
            raise Conflict(f"labels {path}", came=f"made by {', '.join(others)}", expected=self._teacher, fix=_FIX)
        columns = frame.select("query_id", "item_id", "text_key", pl.col("log_odds").fill_null(np.nan))
        self._labels.update({(q, i, t): value for q, i, t, value in columns.iter_rows()})


class Kept:
    """A teacher whose labels are kept in a file: it is asked only for lists that are not there. Implements Teacher."""

    def __init__(self, teacher: Teacher, file: LabelFile) -> None:
        self._teacher, self._file = teacher, file
        self.name, self.fitted = teacher.name, teacher.fitted
        self._reused = self._made = 0

    @property
    def facts(self) -> Mapping[str, Any]:
        """The teacher's, the label file's name, and how many lists' labels were reused and made."""
        lists = {"reused": self._reused, "made": self._made}
        return {**self._teacher.facts, "labels": self._file.folder.name, "lists": lists}

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[int, Judgement]]:
        """See Teacher; what comes is on disk at the end, also when the end is an error, but for what is lost."""
        missing = []
        for at, (query, part) in enumerate(zip(queries, rows, strict=True)):
            if (known := self._file.of(lists, query, part)) is not None:
                self._reused += 1
                yield at, Judgement(log_odds=known)
            else:
                missing.append(at)
        if not missing:
            return
        try:
            for i, said in self._teacher.label(lists, [queries[m] for m in missing], [rows[m] for m in missing]):
                at = missing[i]
                if not said.lost:
                    self._file.add(lists, queries[at], rows[at], said)
                self._made += 1
                yield at, said
        finally:
            self._file.flush()


def _keys(lists: Lists, query: int, rows: npt.NDArray[np.int64]) -> list[tuple[str, str, int]]:
    query_id, history = lists.query_id[query], lists.history_text[query]
    return [(query_id, lists.item_id[r], key(f"{history}\n{lists.item_text[r]}")) for r in rows]
