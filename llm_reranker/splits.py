"""Which lists are learnt from and which judge either task. NumPy only.

Shape legend: R rows of the lists, M items, C collaborative embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_reranker import quality
from llm_reranker.blend import blend
from llm_reranker.config import DistillConfig
from llm_reranker.encoded import Encoded, align
from llm_reranker.fit import Chosen, Scores
from llm_reranker.lists import Lists
from recsys.core.errors import BadInput
from recsys.core.ids import keys

TASKS = ("all", "new-only")
ItemVectors = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
_BLOCKS_MAX = 64  # more distinct query times than this are no windows of towers trained apart


@dataclass(frozen=True, slots=True)
class Split:
    """Queries to train on, of both tasks, and those of the last block of query_time by task."""

    train: list[int]
    validation: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Held:
    """Validation lists of one task: what is scored, what the ranker said, what the users did."""

    chosen: list[Chosen]
    rank: list[Scores]
    label: list[Scores]

    def weight(self, raw: list[Scores], seed: int) -> float:
        """The say of a reranker beside the ranker: none without a sure gain, none where the task has no lists."""
        return quality.choose_weight(self.rank, raw, self.label, seed)

    def blended(self, raw: Sequence[Scores], weight: float) -> list[Scores]:
        """The final order when a reranker has that say, as serving joins the two; all its own order at 1."""
        return [blend(a, b, weight) for a, b in zip(self.rank, raw, strict=True)]


def task_of(lists: Lists, query: int) -> str:
    """The task that a list was asked for."""
    return TASKS[int(lists.new_only[query])]


def split(lists: Lists, config: DistillConfig, seed: int) -> Split:
    """Validation = the fewest last query times that hold `validation_share` of the queries.

    A list without a positive among its best `depth` rows has no order to learn, and is left out.
    Raises: BadInput for lists that leave nothing to train on or to validate with.
    """
    times, counts = np.unique(lists.query_time_us, return_counts=True)
    late = np.flatnonzero(np.cumsum(counts[::-1])[::-1] >= config.validation_share * len(lists)).max()
    is_late = lists.query_time_us >= times[late]
    rng = np.random.default_rng(seed)
    positive = np.array([(lists.label[lists.rows(q)[: config.depth]] > 0).any() for q in range(len(lists))])

    def draw(mask: npt.NDArray[np.bool_], at_most: int) -> list[int]:
        queries = np.flatnonzero(positive & mask)
        return [int(q) for q in queries[np.sort(rng.permutation(len(queries))[:at_most])]]

    train = draw(~is_late, config.train_queries_max)
    validation = {
        task: draw(is_late & (lists.new_only == new_only), config.validation_queries_max)
        for task, new_only in zip(TASKS, (False, True), strict=True)
    }
    if not train or not validation["all"]:
        raise BadInput(
            "lists",
            came=f"{len(times)} query times; with a positive: {len(train)} lists before, "
            f"{len(validation['all'])} of task all in the last",
            expected="lists with positives both before and in the last block of query_time",
            fix="Make lists of two windows or more.",
        )
    return Split(train, validation)


def training(data: Encoded, queries: list[int], depth: int) -> list[Chosen]:
    """What is trained on of each query."""
    return [Chosen(q, data.training_rows(q, depth)) for q in queries]


def held(lists: Lists, queries: list[int], depth: int) -> Held:
    """What is judged of each query: what serving would send."""
    chosen = [Chosen(q, lists.rows(q)[:depth]) for q in queries]
    return Held(chosen, [lists.rank_score[c.rows] for c in chosen], [lists.label[c.rows] for c in chosen])


def common_space(lists: Lists, vectors: ItemVectors | None) -> tuple[ItemVectors, npt.NDArray[np.float32]]:
    """The reference vectors by item key, and the rows' embeddings [R, C] rotated into their space.

    vectors: those serving will use; None: of the last block. Raises: BadInput for another width.
    """
    embedding, key = lists.item_embedding, keys(lists.item_id)
    if not embedding.shape[1]:
        return (np.empty(0, np.int64), np.empty((0, 0), np.float32)), embedding
    block = np.repeat(np.arange(len(lists)), np.diff(lists.offsets))
    block = np.unique(lists.query_time_us, return_inverse=True)[1][block]
    if vectors is None:
        known = np.flatnonzero(~np.isnan(embedding).any(axis=1) & (block == block.max()))
        latest, first = np.unique(key[known], return_index=True)
        vectors = (latest, embedding[known[first]])
    if vectors[1].shape[1] != embedding.shape[1]:
        raise BadInput(
            "item vectors", came=f"width {vectors[1].shape[1]}", expected=f"the lists' {embedding.shape[1]}",
            fix="Make the lists with the run whose tower is served.",
        )  # fmt: skip
    if not len(vectors[0]) or block.max() >= _BLOCKS_MAX:
        return vectors, embedding
    return vectors, align(embedding, block, key, vectors)
