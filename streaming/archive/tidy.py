"""Keeping an archive tidy: small files are merged, merged ones deleted, and forgotten users' rows rewritten away.

All of it is safe at any point of a crash: a file is replaced by a rename, a merged file names the range of those it
holds, so that readers leave them out and the next call deletes them; what was purged is noted after the last file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from recsys.core import logging, metrics
from streaming.archive.coverage import Coverage, save
from streaming.archive.files import CATALOG, Span, Writes, found, split
from streaming.archive.tombstones import tombstones, without
from streaming.config import ArchiveConfig

_log = logging.get_logger(__name__)
_FOLDERS = ("events", "catalog", "changes", "forgotten")


class Tidy:
    """Works on some sources of an archive, a bounded bit at a time."""

    def __init__(self, root: Path, config: ArchiveConfig) -> None:
        self._root, self._config = root, config
        self._due_s = 0.0

    def some(self, mine: Mapping[str, Coverage]) -> dict[str, Coverage]:
        """Purge, then merge the files of one source and day; at most once in `tidy_s`. Gives changed coverage."""
        if time.monotonic() < self._due_s:
            return {}
        changed = self.purge(mine)
        merged = self.merge(mine)
        self._due_s = time.monotonic() + (0.0 if merged else self._config.tidy_s)
        return changed

    def purge(self, mine: Mapping[str, Coverage]) -> dict[str, Coverage]:
        """Rewrite files that hold rows behind a tombstone which has not been applied to their source yet."""
        stones = tombstones(self._root)
        ends = {str(of): int(before) for of, before in stones.group_by("of").agg(pl.col("before").max()).iter_rows()}
        changed: dict[str, Coverage] = {}
        files: dict[str, list[Path]] = {}
        for path in found(self._root, "events") if len(stones) else []:
            files.setdefault(Span.of(path).source, []).append(path)
        for source, coverage in mine.items():
            pending = stones.filter(
                pl.col("before") > pl.col("of").replace_strict(dict(coverage.purged), default=-1, return_dtype=pl.Int64)
            )
            if source.startswith(CATALOG) or not len(pending):
                continue
            rows = sum(_purged(path, source, pending) for path in files.get(source, []))
            changed[source] = replace(coverage, purged=ends)
            writes = Writes()
            save(writes, self._root, source, changed[source])
            writes.commit()
            metrics.PURGED.inc(rows)
            _log.info("archive_purged", source=source, rows=rows, users=pending["user_id"].n_unique())
        return changed

    def merge(self, mine: Mapping[str, Coverage]) -> bool:
        """Merge one run of small files of a source and day, if there is one; delete what was merged long enough ago."""
        newest = max((p.parent.name for f in _FOLDERS for p in found(self._root, f)), default="")
        for folder in _FOLDERS:
            whole, merged = split(p for p in found(self._root, folder) if Span.of(p).source in mine)
            for path in merged:
                if time.time() - path.stat().st_mtime >= self._config.merged_keep_s:
                    path.unlink()
            for (day, _), group in groupby(whole, key=lambda p: (p.parent, Span.of(p).source)):
                enough = self._config.merge_files_min if day.name == newest else 2
                if len(run := self._run(list(group), enough)):
                    _merge(run)
                    return True
        return False

    def _run(self, files: list[Path], enough: int) -> list[Path]:
        """The first run of neighbours that are small, together not too large, and enough of them."""
        run: list[Path] = []
        total = 0
        for path in [*files, None]:
            size = path.stat().st_size if path is not None else 0
            fits = path is not None and size < self._config.small_bytes_max
            if path is not None and fits and total + size <= self._config.merged_bytes_max:
                run.append(path)
                total += size
            elif len(run) >= enough:
                return run
            else:
                run, total = ([path], size) if path is not None and fits else ([], 0)
        return []


def _purged(path: Path, source: str, stones: pl.DataFrame) -> int:
    """Rewrite one file without the rows of forgotten users; returns how many went."""
    users = pq.read_table(path, columns=["user_id"]).column("user_id").unique()
    if not set(stones["user_id"]) & set(users.to_pylist()):
        return 0
    rows = pl.read_parquet(path, hive_partitioning=False)
    kept = without(rows.with_columns(source=pl.lit(source)), stones).drop("source")
    if len(kept) < len(rows):
        writes = Writes()
        writes.parquet(path, kept)
        writes.commit()
    return len(rows) - len(kept)


def _merge(run: list[Path]) -> None:
    """Files of one source and day as one; they stay until readers that have listed them are done."""
    spans = [Span.of(p) for p in run]
    rows = pl.concat([pl.read_parquet(p, hive_partitioning=False) for p in run])
    writes = Writes()
    writes.parquet(run[0].with_name(Span(spans[0].source, spans[0].first, spans[-1].last).file_name), rows)
    writes.commit()
    for path in run:
        path.touch()  # from now on it counts as merged
    _log.info("archive_merged", day=run[0].parent.name, source=spans[0].source, files=len(run), rows=len(rows))
