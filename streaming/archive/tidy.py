"""Keeping an archive tidy: small files are merged, merged ones deleted, and forgotten users' rows rewritten away.

All of it is safe at any point of a crash: a file is replaced by a rename, a merged file names the range of those it
holds, so that readers leave them out and the next call deletes them; what was purged is noted after the last file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import polars as pl

from recsys.core import logging, metrics
from streaming.archive.coverage import Coverage, tidying
from streaming.archive.files import CATALOG, DAILY, ITEMS, Span, Writes, found, split
from streaming.archive.items import first_known
from streaming.archive.purge import derived, purged
from streaming.archive.tombstones import tombstones
from streaming.config import ArchiveConfig

_log = logging.get_logger(__name__)
_WRITING_S_MAX = 600.0  # an unfinished file that nobody has touched for so long is of a process that died


class Tidy:
    """Works on some sources of an archive, a bounded bit at a time, inside `coverage.tidying`."""

    def __init__(self, root: Path, config: ArchiveConfig, offline: Path | None = None) -> None:
        """offline: the offline store, whose samples and snapshots follow from the archive."""
        self._root, self._config, self._offline = root, config, offline
        self._due_s = time.monotonic() + config.tidy_s
        self._purging: list[tuple[str, Path]] = []  # what is left of a round
        self._round: dict[str, pl.DataFrame] = {}  # tombstones that it is about, by source of the files

    def some(self, mine: Mapping[str, Coverage]) -> dict[str, dict[str, int]]:
        """Purge some files, or merge the files of one source and day; at most once in `tidy_s` when there is nothing
        to do. Gives, by source, which tombstones have been applied to it now.
        """
        if time.monotonic() < self._due_s:
            return {}
        self._due_s = time.monotonic() + self._config.tidy_s  # no sooner again where the disk refuses it
        with tidying(self._root, mine) as free:
            applied = self.purge(free, files_max=self._config.purge_files_max)
            is_busy = bool(self._purging) or self.merge(free)
        self._due_s = time.monotonic() + (0.0 if is_busy else self._config.tidy_s)
        return applied

    def purge(self, mine: Mapping[str, Coverage], *, files_max: int | None) -> dict[str, dict[str, int]]:
        """Rewrite files that hold rows behind a tombstone which has not been applied to their source yet.

        A round goes through every file once, files_max a call, and then gives the tombstones it was about. A round that
        a crash ends begins again: a file without such rows is not rewritten.
        """
        if not self._purging:
            stones = tombstones(self._root)
            pending = {s: _pending(stones, c) for s, c in mine.items() if not s.startswith(CATALOG)}
            self._round = {s: some for s, some in pending.items() if len(some)}
            files = [(Span.of(p).source, p) for p in found(self._root, "events")]
            self._purging = [(source, path) for source, path in files if source in self._round]
            self._purging += [("", path) for path in (derived(self._offline) if self._offline is not None else [])]
        self._round = {s: stones for s, stones in self._round.items() if s in mine}  # others are another worker's now
        if not self._round:
            self._purging = []
            return {}
        self._purging = [(source, path) for source, path in self._purging if not source or source in self._round]
        of_all = pl.concat(self._round.values()).unique()
        for source, path in self._purging[:files_max]:
            metrics.PURGED.inc(purged(path, self._round.get(source, of_all), source))
            self._purging.pop(0)  # one that a full disk refused comes again
        if self._purging:
            return {}
        ends = of_all.group_by("of").agg(pl.col("before").max())
        applied = {str(of): int(before) for of, before in ends.iter_rows()}
        _log.info("archive_purged", users=of_all["user_id"].n_unique())
        return {source: {**mine[source].purged, **applied} for source in self._round}

    def merge(self, mine: Mapping[str, Coverage]) -> bool:
        """Merge one run of small files of a source and day, if there is one; delete what was merged long enough ago,
        and what processes that died have left unfinished.
        """
        self._drop_temporary()
        newest = max((p.parent.name for f in DAILY for p in found(self._root, f)), default="")
        for folder in (*DAILY, ITEMS):
            # Behind the coverage a flush is at work, or has died.
            spans = {p: Span.of(p) for p in found(self._root, folder)}
            whole, merged = split(p for p, s in spans.items() if s.source in mine and s.first < mine[s.source].end)
            for path in merged:
                if time.time() - path.stat().st_mtime >= self._config.merged_keep_s:
                    path.unlink()
            for (day, _), group in groupby(whole, key=lambda p: (p.parent, Span.of(p).source)):
                enough = self._config.merge_files_min if day.name in (newest, ITEMS) else 2
                if len(run := self._run(list(group), enough)):
                    _merge(run)
                    return True
        return False

    def _drop_temporary(self) -> None:
        keep_s = max(self._config.merged_keep_s, _WRITING_S_MAX)
        for root in (self._root, *([self._offline / "samples"] if self._offline is not None else [])):
            for path in root.rglob(".*.tmp"):
                with suppress(FileNotFoundError):  # it has got its name meanwhile
                    if time.time() - path.stat().st_mtime >= keep_s:
                        path.unlink()

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


def _pending(stones: pl.DataFrame, coverage: Coverage) -> pl.DataFrame:
    """Tombstones that have not been applied to a source's files."""
    done = pl.col("of").replace_strict(dict(coverage.purged), default=-1, return_dtype=pl.Int64)
    return stones.filter(pl.col("before") > done)


def _merge(run: list[Path]) -> None:
    """Files of one source and day as one; they stay until readers that have listed them are done."""
    spans = [Span.of(p) for p in run]
    rows = pl.concat([pl.read_parquet(p, hive_partitioning=False) for p in run])
    rows = first_known(rows) if run[0].parent.name == ITEMS else rows.unique(maintain_order=True)
    writes = Writes()
    writes.parquet(run[0].with_name(Span(spans[0].source, spans[0].first, spans[-1].last).file_name), rows)
    writes.commit()
    for path in run:
        path.touch()  # from now on it counts as merged
    _log.info("archive_merged", day=run[0].parent.name, source=spans[0].source, files=len(run), rows=len(rows))
