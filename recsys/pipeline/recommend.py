"""One request, from a query to a slate. Read `Cascade.recommend` first: it is the whole way on one screen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_store import FeatureReader, UserFeatures
from llm_reranker import Reranker
from llm_reranker.blend import blend
from recsys.candidates import CandidateSource
from recsys.candidates.merge import fuse, merge
from recsys.candidates.ranked_list import RankedList
from recsys.core import BadInput, Candidates, Deadline, Query, Slate, Tier, Unavailable, keys
from recsys.pipeline.arms import Arm
from recsys.pipeline.budget import Budget
from recsys.pipeline.cache import LastSlates
from recsys.pipeline.ports import PipelineConfig
from recsys.pipeline.rerank import rerank_request
from recsys.pipeline.slate import slate_items
from recsys.pipeline.trace import Trace
from recsys.ranking import FeatureMatrix, Filter, Hydrator, Scorer, Selector
from recsys.ranking.catalogue import Catalogue

Scores = npt.NDArray[np.float32]
RETRIEVAL = "retrieval"


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What the ranker is asked about: the user, N filtered candidates, their features [N, F]."""

    user: UserFeatures
    candidates: Candidates
    features: FeatureMatrix


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """The stages of one arm. Made by `recsys.pipeline.build`; safe for concurrent requests of one event loop."""

    arm: Arm
    catalogue: Catalogue
    features: FeatureReader
    sources: Sequence[CandidateSource]
    hydrator: Hydrator
    filters: Sequence[Filter]
    stock_filters: Sequence[Filter]
    selector: Selector
    popular: RankedList
    slates: LastSlates
    scorer: Scorer | None = None
    reranker: Reranker | None = None
    rerank_weight: float = 0.0
    versions: Mapping[str, str]
    budget: Budget
    config: PipelineConfig
    owned: Sequence[Callable[[], None]] = ()

    async def recommend(self, query: Query, deadline: Deadline) -> Slate:
        """A slate from the best tier that the stages and the deadline allow.

        Raises: BadInput for a limit out of range, DeadlineExceeded when no time is left on arrival. Any later failure
        falls through to the next tier, counted with its reason.
        """
        self._check(query)
        deadline.require("recommend")
        trace = Trace()
        user = await trace.attempt(
            "user",
            (stage := self.budget.stage("user", deadline)),
            self.features.user(query.user_id, query.as_of_us, stage),
        )
        if user is None:
            return self._without_user(query, trace)
        found = await self._retrieve(query, user, deadline, trace)
        found, features = await self._hydrate(query, user, found, deadline, trace)
        if not len(found) and trace.fallbacks:
            return self._without_user(query, trace)
        score, tier = found.score(RETRIEVAL), max(self.arm.tier, Tier.RETRIEVAL)
        if self.scorer is not None and features is not None and len(found):
            ranked = await self._rank(query, user, found, features, deadline, trace)
            if ranked is not None:
                found, score, tier = found.with_score("rank", ranked), ranked, Tier.RANK
                if self.reranker is not None:
                    reranked = await self._rerank(query, user, found, features, deadline, trace)
                    if reranked is not None:
                        score = blend(ranked, reranked, self.rerank_weight) if self.rerank_weight else ranked
                        found, tier = found.with_score("rerank", reranked), Tier.FULL
        return self._answer(query, user, found, score, tier, trace)

    async def collect(self, query: Query, deadline: Deadline) -> Collected:
        """Everything before scoring, for training lists and labels.

        Raises: Unavailable when any stage fell through: a training list with a source missing would teach a lie.
        """
        self._check(query)
        trace = Trace()
        user = await self.features.user(query.user_id, query.as_of_us, deadline)
        found = await self._retrieve(query, user, deadline, trace)
        found, features = await self._hydrate(query, user, found, deadline, trace)
        if trace.fallbacks or features is None:
            raise Unavailable(
                f"candidates of user {query.user_id}",
                came=", ".join(trace.fallbacks),
                expected="every source and feature",
                fix="Look at the named stage, then run again.",
            )
        return Collected(user=user, candidates=found, features=features)

    def close(self) -> None:
        """Release what `build` started in this process; ports are closed by whoever opened them."""
        for release in self.owned:
            release()

    def _check(self, query: Query) -> None:
        if not 1 <= query.limit <= self.config.limit_max:
            raise BadInput(
                "query, limit", came=query.limit, expected=f"1 to {self.config.limit_max}", fix="Ask for fewer items."
            )

    async def _retrieve(self, query: Query, user: UserFeatures, deadline: Deadline, trace: Trace) -> Candidates:
        """Ask every source at once; what fails is left out. Then drop what must not be shown, and fuse."""
        stage = self.budget.stage("sources", deadline)
        banned = keys({*query.exclude, *query.cart, query.current_item} - {""})
        ask = max(self.config.source_items_max, query.limit) + len(banned)
        lists = await asyncio.gather(
            *(trace.attempt(s.name, stage, s.retrieve(query, user, ask, stage)) for s in self.sources)
        )
        start_s = time.monotonic()
        given = [c.take(~np.isin(c.item_key, banned)) if len(banned) else c for c in lists if c is not None]
        quotas = {f.source: f.quota for f in self.arm.feeds}
        if "popular" in quotas:
            quotas["popular"] = max(quotas["popular"], query.limit)
        union = merge(given, quotas)
        found = self._filtered(self.filters, query, user, union, None)
        weights = {f.source: f.weight for f in self.arm.feeds}
        found = found.with_score(RETRIEVAL, fuse(found, weights, [f.source for f in self.arm.feeds if f.absolute]))
        trace.done("merge", start_s, "ok", sum(map(len, given)), len(found))
        return found

    async def _hydrate(
        self, query: Query, user: UserFeatures, found: Candidates, deadline: Deadline, trace: Trace
    ) -> tuple[Candidates, FeatureMatrix | None]:
        """Read item features, then drop what is sold out or delisted. Without features everything stays."""
        stage = self.budget.stage("hydrate", deadline)
        features = await trace.attempt("hydrate", stage, self.hydrator.hydrate(query, user, found, stage), len(found))
        if features is None:
            return found, None
        keep = np.ones(len(found), np.bool_)
        for f in self.stock_filters:
            keep &= f.keep(query, user, found, features)
        if keep.all():
            return found, features
        return found.take(keep), FeatureMatrix(names=features.names, values=features.values[keep])

    async def _rank(
        self,
        query: Query,
        user: UserFeatures,
        found: Candidates,
        features: FeatureMatrix,
        deadline: Deadline,
        trace: Trace,
    ) -> Scores | None:
        assert self.scorer is not None
        stage = self.budget.stage("rank", deadline)
        work = self.scorer.score(query, user, found, features, stage)
        scores = await trace.attempt("rank", stage, work, len(found))
        return _usable("rank", scores, trace) if scores is not None else None

    async def _rerank(
        self,
        query: Query,
        user: UserFeatures,
        found: Candidates,
        features: FeatureMatrix,
        deadline: Deadline,
        trace: Trace,
    ) -> Scores | None:
        """Scores [N] of the LLM for the ranker's best `rerank_depth`, NaN beyond; None when it fell through."""
        assert self.reranker is not None
        stage = self.budget.stage("rerank", deadline)
        rows = np.lexsort((found.item_key, -found.score("rank")))[: self.arm.rerank_depth]
        request = rerank_request(
            query, user, found, features, rows, self.catalogue, self.reranker, self.config.rerank_history_max
        )
        result = await trace.attempt("rerank", stage, self.reranker.rerank(request, stage), len(rows))
        if result is None or _usable("rerank", result.scores[: result.depth], trace) is None:
            return None
        scores = np.full(len(found), np.nan, np.float32)
        scores[rows] = result.scores
        return scores

    def _without_user(self, query: Query, trace: Trace) -> Slate:
        """The last two tiers: the user's last slate, else what is popular; both filtered again."""
        nobody = UserFeatures.not_found(query.user_id, query.as_of_us)
        cached = self.slates.get(query)
        if cached is not None:
            found = self._filtered(self.filters, query, nobody, cached, None)
            if len(found):
                return self._answer(query, nobody, found, found.score("slate"), Tier.CACHED, trace)
        head = self.popular.head(query, nobody, query.limit + len(query.exclude) + len(query.cart) + 1)
        found = self._filtered(self.filters, query, nobody, head, None)
        return self._answer(query, nobody, found, found.score("popular"), Tier.POPULAR, trace)

    def _filtered(
        self,
        filters: Sequence[Filter],
        query: Query,
        user: UserFeatures,
        found: Candidates,
        features: FeatureMatrix | None,
    ) -> Candidates:
        keep = np.ones(len(found), np.bool_)
        for f in filters:
            keep &= f.keep(query, user, found, features)
        return found if keep.all() else found.take(keep)

    def _answer(
        self, query: Query, user: UserFeatures, found: Candidates, score: Scores, tier: Tier, trace: Trace
    ) -> Slate:
        start_s = time.monotonic()
        selection = self.selector.select(query, found, score, query.limit)
        shown, shown_score = found.take(selection.rows), score[selection.rows]
        items = slate_items(user, shown, shown_score, selection.propensity, self.catalogue)
        if tier < Tier.CACHED:
            places = -np.arange(len(shown), dtype=np.float32)
            self.slates.put(query, shown.with_score("slate", places))
        trace.done("select", start_s, "ok", len(found), len(items))
        return Slate(
            request_id=query.request_id,
            items=items,
            tier=tier,
            timings=tuple(trace.timings),
            fallbacks=tuple(trace.fallbacks),
            versions=self.versions,
        )


def _usable(stage: str, scores: Scores, trace: Trace) -> Scores | None:
    """The scores, unless they are not finite or all the same: then the stage said nothing and the tier falls."""
    if not np.isfinite(scores).all():
        trace.fell_through(stage, "non-finite")
        return None
    if len(scores) > 1 and scores.max() == scores.min():
        trace.fell_through(stage, "constant")
        return None
    return scores
