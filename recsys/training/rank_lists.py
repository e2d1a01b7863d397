"""Training lists of the ranker: what the cascade finds for the users of one window, and what they then acted on.

Either task, all and new-only, has lists of its own, found by requests of its own: a request for new items alone fills
the sources' quotas with other items, so a list of task all without what the user had touched is no such list.
The lists come from the same code that answers requests (`recsys.pipeline`), on a run and a feature store that know
nothing from the window's start on. So a label can never be among its own features.

Shape legend: Q queries, N candidates of all queries, F features.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors import safe_open
from safetensors.numpy import save_file

from feature_store import FeatureReader
from recsys.candidates.fusion import Fusion
from recsys.core import Candidates, Deadline, Query, RunDirectory, disk, keys
from recsys.core.clock import ManualClock
from recsys.core.events import EVENT_TYPE_BY_LABEL
from recsys.core.ids import find_rows
from recsys.core.progress import bar
from recsys.evaluation.queries import ANY_POSITIVE
from recsys.models.history import Histories
from recsys.pipeline import Collected, Ports, build

ARM = "retrieval"
_CONCURRENT = 4
_ROWS = ("values", "label", "acted", "item_key", "source", "retrieval_score")
_QUERIES = ("num_relevant", "new_only")
_NUMBERS = (*_ROWS, *_QUERIES, "offsets")
_ACTIONS = ("item_key", "event_type", "time_us", "lengths", "as_of_us")
_WORDS = ("names", "source_names", "user_id")
COLUMNS = (*_NUMBERS, *_ACTIONS, *_WORDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLists:
    """Q lists. Rows offsets[q] to offsets[q + 1] are query q's candidates.

    names: of the F features. values: float32 [N, F]; label: bool [N], acted on in the window as is to be foreseen;
    acted: uint8 [N], all that the user did with the item in the window, the sum of `bit_of` its behaviours; new_only:
    bool [Q], the task that was asked; num_relevant: int64 [Q], also what was not found; source: int64 [N], place in
    `source_names` of the first source that gave the row; histories: Q histories as of the query's time.
    """

    names: tuple[str, ...]
    source_names: tuple[str, ...]
    values: npt.NDArray[np.float32]
    label: npt.NDArray[np.bool_]
    acted: npt.NDArray[np.uint8]
    item_key: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    retrieval_score: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]
    num_relevant: npt.NDArray[np.int64]
    new_only: npt.NDArray[np.bool_]
    user_id: tuple[str, ...]
    histories: Histories

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def query_of_row(self) -> npt.NDArray[np.int64]:
        """Query number of each row [N]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def did(self, behaviour: str) -> npt.NDArray[np.bool_]:
        """Whether the user did this with the item in the window [N]; of all candidates, touched before or not."""
        return self.acted & bit_of(behaviour) > 0

    def of_task(self, *, new_only: bool) -> RankLists:
        """The lists of one task, in order."""
        return self.where(self.new_only == new_only)

    def where(self, kept: npt.NDArray[np.bool_]) -> RankLists:
        """The lists for which `kept` [Q] is true, in order."""
        rows, users = kept[self.query_of_row()], np.flatnonzero(kept)
        columns = {n: getattr(self, n)[rows] for n in _ROWS} | {n: getattr(self, n)[users] for n in _QUERIES}
        return replace(
            self,
            **columns,
            offsets=np.concatenate([[0], np.cumsum(np.diff(self.offsets)[users])]).astype(np.int64),
            user_id=tuple(self.user_id[u] for u in users),
            histories=self.histories.take(users),
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        columns = {n: getattr(self, n) for n in _NUMBERS} | {
            f"histories.{n}": getattr(self.histories, n) for n in _ACTIONS
        }
        words = {n: json.dumps(list(getattr(self, n))) for n in _WORDS}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with disk.writing(temporary):
            save_file({n: np.ascontiguousarray(c) for n, c in columns.items()}, temporary, metadata=words)
        temporary.rename(path)

    @classmethod
    def load(cls, path: Path) -> RankLists:
        """Read what `save` wrote."""
        with safe_open(path, framework="numpy") as file:
            words: dict[str, Any] = {n: tuple(json.loads(file.metadata()[n])) for n in _WORDS}
            numbers: dict[str, Any] = {n: file.get_tensor(n) for n in _NUMBERS}
            histories = Histories(**{n: file.get_tensor(f"histories.{n}") for n in _ACTIONS})
        return cls(**words, **numbers, histories=histories)

    @classmethod
    def concat(cls, parts: Sequence[RankLists]) -> RankLists:
        """All lists of all parts, in order."""
        sizes = np.concatenate([np.diff(p.offsets) for p in parts])
        columns: dict[str, Any] = {n: np.concatenate([getattr(p, n) for p in parts]) for n in (*_ROWS, *_QUERIES)}
        return replace(
            parts[0],
            **columns,
            offsets=np.concatenate([[0], np.cumsum(sizes)]),
            user_id=tuple(u for p in parts for u in p.user_id),
            histories=Histories.concat([p.histories for p in parts]),
        )


def collect(
    queries: pl.DataFrame,
    run: RunDirectory,
    features: FeatureReader,
    *,
    candidates_max: int,
    seed: int,
    fusion: Fusion | None = None,
) -> RankLists:
    """The lists of `queries`, from a run and a store made strictly before them.

    queries: as recsys.evaluation.make_queries makes them, with columns `new_only`, of which task each is, `acted_id`
    and `acted_bits`, what the user did in the window: item ids, and for each the sum of `bit_of` its behaviours.
    Of a list longer than `candidates_max` all relevant rows and a random part of the others stay.
    fusion: how the sources count in the retrieval order, learnt before these queries; None = the arm's own weights.
    """
    return asyncio.run(_collect(queries, run, features, candidates_max, seed, fusion))


async def _collect(
    queries: pl.DataFrame,
    run: RunDirectory,
    features: FeatureReader,
    candidates_max: int,
    seed: int,
    fusion: Fusion | None,
) -> RankLists:
    clock = ManualClock(int(queries["query_time"].max()) if len(queries) else 0)  # type: ignore[arg-type]
    cascade = build(ARM, run, Ports(features=features, clock=clock, rng=np.random.default_rng(seed)), fusion=fusion)
    gate = asyncio.Semaphore(_CONCURRENT)
    rng = np.random.default_rng(seed)
    try:
        with bar(total=len(queries), what="lists", unit="query") as progress:

            async def one(user_id: str, time_us: int, new_only: bool) -> Collected:
                async with gate:
                    query = Query(user_id=user_id, as_of_us=time_us, new_only=new_only)
                    found = await cascade.collect(query, Deadline.never())
                    progress.update()
                    return found

            asked = queries.select("user_id", "query_time", "new_only").iter_rows()
            found = await asyncio.gather(*(one(*query) for query in asked))
    finally:
        cascade.close()
    return _lists(queries, found, candidates_max, rng)


def _lists(
    queries: pl.DataFrame, found: Sequence[Collected], candidates_max: int, rng: np.random.Generator
) -> RankLists:
    relevant = [keys(ids) for ids in queries["relevant"].to_list()]
    label = [np.isin(c.candidates.item_key, r) for c, r in zip(found, relevant, strict=True)]
    rows = [_keep(hit, candidates_max, rng) for hit in label]
    done = zip(queries["acted_id"].to_list(), queries["acted_bits"].to_list(), strict=True)
    acted = [_acted(c.candidates.item_key, *one) for c, one in zip(found, done, strict=True)]
    parts = list(zip(found, rows, strict=True))
    users = [c.user for c in found]
    return RankLists(
        names=found[0].features.names,
        source_names=found[0].candidates.source_names,
        values=np.concatenate([c.features.values[r] for c, r in parts]),
        label=np.concatenate([hit[r] for hit, r in zip(label, rows, strict=True)]),
        acted=np.concatenate([bits[r] for bits, r in zip(acted, rows, strict=True)]),
        item_key=np.concatenate([c.candidates.item_key[r] for c, r in parts]),
        source=np.concatenate([_first_source(c.candidates)[r] for c, r in parts]),
        retrieval_score=np.concatenate([c.candidates.score("retrieval")[r] for c, r in parts]),
        offsets=np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
        num_relevant=np.array([len(r) for r in relevant], np.int64),
        new_only=queries["new_only"].to_numpy(),
        user_id=tuple(queries["user_id"].to_list()),
        histories=Histories.from_lists(
            [u.recent_item_key for u in users],
            [u.recent_event_type for u in users],
            [u.recent_time_us for u in users],
            [u.as_of_us for u in users],
        ),
    )


def heads_of(parts: Sequence[RankLists], positives: Sequence[str]) -> tuple[str, ...]:
    """What a ranker of these windows' lists foresees: the target's name, then other behaviours that have a head.

    Those are behaviours that somebody did with a candidate both in the last window, where they are calibrated, and
    before it, where they are learnt. A target of one behaviour has its name and needs no head beside it.
    """
    target = "any" if set(positives) == set(ANY_POSITIVE) else "+".join(positives)
    *earlier, last = parts
    judged = last.of_task(new_only=False)
    others = [b for b in ANY_POSITIVE if judged.did(b).any() and any(part.did(b).any() for part in earlier)]
    return (target, *(b for b in others if b != target))


def bit_of(behaviour: str) -> int:
    """The bit of a behaviour (an event type's label) in `RankLists.acted`."""
    return 1 << EVENT_TYPE_BY_LABEL[behaviour]


def _acted(
    item_key: npt.NDArray[np.int64], acted_id: Sequence[str], acted_bits: Sequence[int]
) -> npt.NDArray[np.uint8]:
    """Of each candidate what the user did with it [N], 0 for nothing."""
    key = keys(acted_id)
    order = np.argsort(key, kind="stable")
    place = find_rows(key[order], item_key, order)
    return np.append(np.array(acted_bits, np.uint8), np.uint8(0))[place]  # place -1 is the last


def _keep(label: npt.NDArray[np.bool_], rows_max: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Rows that stay, in their order: the relevant ones first of all, then a random part of the others."""
    if len(label) <= rows_max:
        return np.arange(len(label))
    return np.sort(np.argsort(rng.random(len(label)) - 2.0 * label, kind="stable")[:rows_max])


def _first_source(found: Candidates) -> npt.NDArray[np.int64]:
    lowest: npt.NDArray[np.int64] = np.log2(found.source_bits & (~found.source_bits + 1)).astype(np.int64)
    return lowest
