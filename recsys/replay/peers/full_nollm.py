"""full_nollm: the LLM's place taken by LightGBM. What it gains over `rank` needs no language model.

It reorders the ranker's best candidates as the LLM does: the same lists to learn from, the ranker's own features, the
scores of retriever and ranker, text similarity to the history and, where the student had a teacher, a booster fitted to
the teacher's labels. Its weight beside the ranker is chosen per task on the same validation lists by the same rule.

Shape legend: R rows, N candidates, L texts of a history, F features.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from llm_reranker import RerankRequest, RerankResult
from llm_reranker.config import DistillConfig
from llm_reranker.lists import Lists, read
from llm_reranker.prompt import item_texts
from recsys.core import Deadline, RunDirectory, keys
from recsys.core.items import ItemTable
from recsys.data import Dataset
from recsys.pipeline import RerankWeights
from recsys.replay.peers import lambdamart
from recsys.replay.peers.base import package
from recsys.training import rerank_lists
from recsys.training.lists import foreseen, window_lists, window_starts
from recsys.training.rank_lists import RankLists
from recsys.training.settings import Settings

NAME = "full_nollm"
_STAGES = ("rank_score", "rank_position")
_TEXT = ("text_closest", "text_mean")
_HISTORY_TEXTS_MAX = 30
_STOP_SHARE = 0.2  # of the training lists, the latest, decide how many trees
_LABELS_MIN = 50  # lists with a teacher's labels, fewer teach nothing
_WORD = re.compile(r"[^\W_]+")
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class TextLikeness:
    """Cosine of TF-IDF word vectors between items and the items of a history."""

    def __init__(self, texts: Sequence[str]) -> None:
        """texts: of the catalogue, from which words and their rarity are known."""
        counts = Counter(word for text in texts for word in set(_words(text)))
        self._place = {word: i for i, word in enumerate(counts)}
        rarity = [np.log(len(texts) / (1 + c)) + 1 for c in counts.values()]
        self._rarity = np.maximum(np.array(rarity, np.float32), 0)
        self._vectors: dict[str, dict[int, float]] = {}

    def features(self, texts: Sequence[str], history: Sequence[str]) -> Floats:
        """[N, 2]: likeness to the closest of the history's texts, and to all of them on average; NaN without any."""
        past = [v for t in history[:_HISTORY_TEXTS_MAX] if (v := self._vector(t))]
        if not past:
            return np.full((len(texts), len(_TEXT)), np.nan, np.float32)
        rows = []
        for text in texts:
            own = self._vector(text)
            like = [sum(w * v.get(word, 0.0) for word, w in own.items()) for v in past]
            rows.append((max(like), sum(like) / len(like)))
        return np.array(rows, np.float32).reshape(len(texts), len(_TEXT))

    def _vector(self, text: str) -> dict[int, float]:
        if text not in self._vectors:
            known = {i: float(self._rarity[i]) for word in _words(text) if (i := self._place.get(word)) is not None}
            norm = sum(w * w for w in known.values()) ** 0.5
            self._vectors[text] = {i: w / norm for i, w in known.items()} if norm else {}
        return self._vectors[text]


@dataclass(frozen=True, kw_only=True)
class NoLlmReranker:
    """Implements Reranker with boosters in this process."""

    version: str
    feature_names: tuple[str, ...]
    weights: RerankWeights
    items: ItemTable
    likeness: TextLikeness
    booster: Any
    taught: Any | None

    async def rerank(self, request: RerankRequest, deadline: Deadline) -> RerankResult:
        """Scores of all candidates. Raises: DeadlineExceeded when no time is left on arrival."""
        deadline.require(NAME)
        texts = item_texts(self.items, keys(request.item_ids))
        text = self.likeness.features(texts, [h.text for h in reversed(request.history)])
        values = np.concatenate([request.features, text], axis=1)
        scores = np.asarray(self.booster.predict(_with(self.taught, values), num_threads=1), np.float32)
        return RerankResult(scores=scores, depth=len(scores), version=self.version)


def fit(dataset: Dataset, run: RunDirectory, seed: int) -> NoLlmReranker:
    """Fitted on the run's candidate lists for distillation: those beside it where they are, else made again there."""
    from llm_reranker.splits import TASKS, held, split  # heavy

    work = run.work
    path = work / rerank_lists.FILE
    lists = read(path if path.is_file() else rerank_lists.make(dataset.root, run))
    items = ItemTable.read(run.path("items.parquet"))
    likeness = TextLikeness(item_texts(items, items.item_key))
    names, values_RF = _values(lists, dataset, run, work)
    config = DistillConfig()
    parts = split(lists, config, seed)
    learn = _Part(lists, values_RF, likeness, held(lists, parts.train, config.depth).chosen)
    taught, by_teacher = _taught(learn, _teacher_labels(run, work), seed)
    booster = _ranker(learn, by_teacher, seed)
    weight = {}
    for task in TASKS:
        of = held(lists, parts.validation[task], config.depth)
        judge = _Part(lists, values_RF, likeness, of.chosen)
        said = booster.predict(_with(taught, judge.values), num_threads=1) if of.chosen else np.empty(0)
        raw = np.split(np.asarray(said, np.float32), np.cumsum(judge.sizes)[:-1])
        weight[task] = of.weight(raw, seed)
    return NoLlmReranker(
        version=NAME,
        feature_names=(*names, *_STAGES),
        weights=RerankWeights(all=weight["all"], new_only=weight["new-only"]),
        items=items,
        likeness=likeness,
        booster=booster,
        taught=taught,
    )


class _Part:
    """Chosen rows of some lists as the boosters see them, one list after another in time order."""

    def __init__(self, lists: Lists, values_RF: Floats, likeness: TextLikeness, chosen: Sequence[Any]) -> None:
        """chosen: llm_reranker.fit.Chosen of each list."""
        chosen = sorted(chosen, key=lambda c: int(lists.query_time_us[c.query]))
        self.sizes = np.array([len(c.rows) for c in chosen], np.int64)
        rows = np.concatenate([c.rows for c in chosen]) if chosen else np.empty(0, np.int64)
        position = np.concatenate([np.arange(n) for n in self.sizes]) if chosen else np.empty(0)
        text = [
            likeness.features([lists.item_text[r] for r in c.rows], _history(lists.history_text[c.query]))
            for c in chosen
        ]
        stages = np.stack([lists.rank_score[rows], position], axis=1)
        self.values = np.concatenate(
            [values_RF[rows], stages, np.concatenate(text) if text else np.empty((0, len(_TEXT)))], axis=1
        ).astype(np.float32)
        self.label = lists.label[rows] > 0
        self.key = [(lists.query_id[c.query], lists.item_id[r]) for c in chosen for r in c.rows]
        self.list_of_row = np.repeat(np.arange(len(chosen)), self.sizes)


def _values(lists: Lists, dataset: Dataset, run: RunDirectory, work: Path) -> tuple[tuple[str, ...], Floats]:
    """Names and values [R, F] of the ranker's features of every row, from the window lists the rows were made of."""
    settings, seed = Settings.from_dict(run.manifest["config"]), int(run.manifest["seed"])
    windows = window_starts(dataset, run.until_us, settings)
    positives = foreseen(dataset, windows, settings.training)
    made = window_lists(dataset, windows, positives, seed=seed, settings=settings, work=work)
    at = {rerank_lists.query_id(part, q): (part, q) for part in made for q in range(len(part))}
    values = np.full((len(lists.item_id), len(made[0].names)), np.nan, np.float32)
    item_key = keys(lists.item_id)
    for query, query_id in enumerate(lists.query_id):
        part, q = at[query_id]
        rows = np.arange(lists.offsets[query], lists.offsets[query + 1])
        values[rows] = _rows_of(part, q, item_key[rows])
    return made[0].names, values


def _rows_of(part: RankLists, q: int, item_key: Rows) -> Floats:
    start, stop = part.offsets[q], part.offsets[q + 1]
    order = np.argsort(part.item_key[start:stop], kind="stable")
    place = order[np.searchsorted(part.item_key[start:stop], item_key, sorter=order)]
    found: Floats = part.values[start + place]
    return found


def _teacher_labels(run: RunDirectory, work: Path) -> Mapping[tuple[str, str], float]:
    """The labels that the run's reranker was distilled from, by query and item; none where it had no teacher."""
    versions = run.reranker_versions()
    if not versions:
        return {}
    card = json.loads(run.path(f"reranker/{versions[-1]}/double11.json").read_text("utf-8"))
    said = card["report"]["teacher"]
    folder = work / "labels" / str(said.get("labels", ""))
    if not any(said["beats_rank"].values()) or not any(folder.glob("part-*.parquet")):
        return {}
    frame = pl.read_parquet(folder / "part-*.parquet").select("query_id", "item_id", "log_odds").drop_nulls()
    return {(q, i): value for q, i, value in frame.iter_rows()}


def _taught(part: _Part, labels: Mapping[tuple[str, str], float], seed: int) -> tuple[Any | None, Floats | None]:
    """A booster of the teacher's log-odds, and what it says of rows that it was not fitted on [R]."""
    target = np.array([labels.get(k, np.nan) for k in part.key], np.float32)
    known = np.isfinite(target)
    if len(np.unique(part.list_of_row[known])) < _LABELS_MIN:
        return None, None
    fold = part.list_of_row % 2
    said = np.empty(len(target), np.float32)
    for other in (0, 1):
        fitted = _regression(part.values[known & (fold != other)], target[known & (fold != other)], seed)
        said[fold == other] = fitted.predict(part.values[fold == other], num_threads=1)
    return _regression(part.values[known], target[known], seed), said


def _regression(values: Floats, target: Floats, seed: int) -> Any:
    lightgbm = package("lightgbm")
    options = lambdamart.TREES | {"objective": "regression", "metric": "l2", "seed": seed}
    return lightgbm.train(options, lightgbm.Dataset(values, target), lambdamart.ROUNDS_MAX // 3)


def _ranker(part: _Part, by_teacher: Floats | None, seed: int) -> Any:
    """LambdaMART on what users did; as many trees as are best on the latest lists, then fitted on all."""
    lightgbm = package("lightgbm")
    values = part.values if by_teacher is None else np.concatenate([part.values, by_teacher[:, None]], axis=1)
    options = lambdamart.TREES | {"seed": seed}
    lists = len(part.sizes)
    early = part.list_of_row < max(1, int(lists * (1 - _STOP_SHARE)))

    def data(mask: npt.NDArray[np.bool_], reference: Any = None) -> Any:
        sizes = np.bincount(part.list_of_row[mask], minlength=lists)
        return lightgbm.Dataset(
            values[mask], part.label[mask].astype(np.int8), group=sizes[sizes > 0], reference=reference,
            free_raw_data=False,
        )  # fmt: skip

    rounds = lambdamart.ROUNDS_MAX // 3
    if not early.all():
        stop = lightgbm.early_stopping(lambdamart.PATIENCE, verbose=False)
        fitted = data(early)
        judged = lightgbm.train(
            options, fitted, lambdamart.ROUNDS_MAX, valid_sets=[data(~early, fitted)], callbacks=[stop]
        )
        rounds = max(judged.best_iteration, 10)
    return lightgbm.train(options, data(np.ones(len(values), np.bool_)), rounds)


def _with(taught: Any | None, values: Floats) -> Floats:
    if taught is None:
        return values
    said = np.asarray(taught.predict(values, num_threads=1), np.float32)
    return np.concatenate([values, said[:, None]], axis=1)


def _history(text: str) -> list[str]:
    """The item texts of a history as lists carry it: "purchase 3d: title | category"."""
    return [line.partition(": ")[2] for line in text.split("\n") if line]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
