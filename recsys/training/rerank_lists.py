"""Candidate lists for distillation: what the reranker will see, from the windows that trained the ranker.

Every list, of task all or of task new-only as it was asked, holds the ranker's best candidates by a score from a ranker
that never saw the list's window, what else the user acted on among the candidates, and a few more negatives: of the
same category as a relevant item, and at random.
Embeddings are those of the window's own tower. Nothing in a row is from the query's time or later, but the label.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from llm_reranker import HistoryItem
from llm_reranker.lists import SCHEMA
from llm_reranker.prompt import history_text, item_texts
from recsys.core import RunDirectory, VersionMismatch
from recsys.core.items import ItemTable
from recsys.data import Dataset
from recsys.models.embeddings import Vocabulary
from recsys.models.ranker import Ranker
from recsys.models.tower import Tower
from recsys.training.assemble import out_of_fold_scores
from recsys.training.base_run import window_run
from recsys.training.lists import foreseen, window_lists, window_starts
from recsys.training.rank_lists import RankLists
from recsys.training.settings import Settings

DEPTH = 40  # candidates by rank
FILE = "rerank-lists.parquet"  # in RUN.work
EXTRA = 5  # negatives of either kind
_HISTORY_ITEMS_MAX = 50
_SAME_CATEGORY, _RANDOM = "same_category", "random"


def make(dataset_dir: Path | str, run: RunDirectory) -> Path:
    """Write RUN.work/rerank-lists.parquet (llm_reranker.lists.SCHEMA) and return its path.

    The windows of the run's own training are used again where they are still there.
    Raises: VersionMismatch when the run was trained on another dataset.
    """
    dataset = Dataset.open(dataset_dir)
    if dataset.hash != run.manifest["dataset_hash"]:
        raise VersionMismatch(
            f"run {run.run_id}, dataset",
            came=dataset.hash,
            expected=str(run.manifest["dataset_hash"]),
            fix="Pass the dataset directory that the run was trained on.",
        )
    with run.settings_of("training"):
        settings, seed = Settings.from_dict(run.manifest["config"]), int(run.manifest["seed"])
    work = run.work
    windows = window_starts(dataset, run.until_us, settings)
    positives = foreseen(dataset, windows, settings.training)
    lists = window_lists(dataset, windows, positives, seed=seed, settings=settings, work=work)
    items = ItemTable.read(run.path("items.parquet"))
    scores = out_of_fold_scores(lists, items, Ranker.load(run), seed=seed, settings=settings, work=work)
    path = work / FILE
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for part, part_scores in zip(lists, scores, strict=True):
            start_us = int(part.histories.as_of_us[0])
            base, known = window_run(dataset, start_us, seed=seed, settings=settings, work=work)
            window = _Window(part, part_scores, known, Tower.load(base), np.random.default_rng(seed))
            writer.write_table(pa.Table.from_pylist(list(window.rows()), schema=SCHEMA))
    return path


def query_id(lists: RankLists, q: int) -> str:
    """Of one list, distinct by user, time and task."""
    name = f"{lists.user_id[q]}@{lists.histories.as_of_us[q]}"
    return f"{name}/new-only" if lists.new_only[q] else name


class _Window:
    """Rows of one window."""

    def __init__(
        self,
        lists: RankLists,
        scores: npt.NDArray[np.float32],
        items: ItemTable,
        tower: Tower,
        rng: np.random.Generator,
    ) -> None:
        self.lists, self.scores, self.items, self.rng = lists, scores, items, rng
        keys, vectors = tower.item_vectors()
        self.vocabulary = Vocabulary(keys)
        self.vectors = vectors
        self.category = np.array([c or "" for c in items.column("category")])
        self.text = item_texts(items, items.item_key)
        self.item_id = items.column("item_id")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of every list that has something relevant in it, in SCHEMA's columns."""
        offsets = self.lists.offsets
        for q, (start, stop) in enumerate(itertools.pairwise(offsets)):
            if self.lists.label[start:stop].any():
                yield from self._query(q, np.arange(start, stop))

    def _query(self, q: int, rows: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        lists = self.lists
        best = rows[np.lexsort((lists.item_key[rows], -self.scores[rows]))]
        place = self.items.rows(lists.item_key[best])
        best, place = best[place >= 0], place[place >= 0]
        relevant = lists.label[best]
        keep = relevant | (np.arange(len(best)) < DEPTH)
        rest = np.flatnonzero(~keep)
        wanted = np.isin(self.category[place], self.category[place[relevant]]) & (self.category[place] != "")
        same = self._draw(rest[wanted[rest]])
        random = self._draw(np.setdiff1d(rest, same))
        origins = dict.fromkeys(same.tolist(), _SAME_CATEGORY) | dict.fromkeys(random.tolist(), _RANDOM)
        chosen = np.union1d(np.flatnonzero(keep), np.concatenate([same, random])).astype(np.int64)
        one = lists.histories.take(np.array([q]))
        as_of_us = int(one.as_of_us[0])
        shared = {
            "query_id": query_id(lists, q),
            "query_time": as_of_us,
            "new_only": bool(lists.new_only[q]),
            "history_text": self._history(one.item_key, one.event_type, one.time_us, as_of_us),
        }
        for i in chosen.tolist():
            row, at = int(best[i]), int(place[i])
            vector = self.vectors[self.vocabulary.rows(lists.item_key[row : row + 1])[0] - 1]
            retrieval = float(lists.retrieval_score[row])
            yield shared | {
                "item_id": self.item_id[at],
                "item_text": self.text[at],
                "item_embedding": vector.tolist(),
                "retrieval_score": None if np.isnan(retrieval) else retrieval,
                "rank_score": float(self.scores[row]),
                "origin": origins.get(i, lists.source_names[lists.source[row]]),
                "label": float(lists.label[row]),
            }

    def _draw(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self.rng.permutation(rows)[:EXTRA]

    def _history(
        self,
        item_key: npt.NDArray[np.int64],
        event_type: npt.NDArray[np.int64],
        time_us: npt.NDArray[np.int64],
        as_of_us: int,
    ) -> str:
        place = self.items.rows(item_key)
        known = np.flatnonzero(place >= 0)[-_HISTORY_ITEMS_MAX:]
        events = [
            HistoryItem(
                item_id=self.item_id[place[i]],
                text=self.text[place[i]],
                event_type=int(event_type[i]),
                event_time_us=int(time_us[i]),
            )
            for i in known.tolist()
        ]
        return history_text(events, as_of_us)
