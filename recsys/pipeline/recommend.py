"""One request, from a query to a slate. Read `Cascade.recommend` first: it is the whole way on one screen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from feature_store import FeatureReader, FeatureStatus, UserFeatures
from llm_reranker import Reranker
from llm_reranker.blend import blend
from recsys.candidates import CandidateSource, SearchesWhere, popular
from recsys.candidates.fusion import Fusion, fuse
from recsys.candidates.merge import append, merge
from recsys.candidates.ranked_list import RankedList
from recsys.core import BadInput, Candidates, Deadline, Query, Slate, Tier, Unavailable, keys
from recsys.pipeline.arms import Arm
from recsys.pipeline.budget import Budget
from recsys.pipeline.cache import LastSlates
from recsys.pipeline.ports import NO_SAY, PipelineConfig, RerankWeights
from recsys.pipeline.rerank import rerank_request
from recsys.pipeline.slate import slate_items
from recsys.pipeline.trace import Health, Trace
from recsys.ranking import FeatureMatrix, Filter, Hydrator, Scorer, Selector
from recsys.ranking.catalogue import Catalogue

Scores = npt.NDArray[np.float32]
RETRIEVAL = "retrieval"
_ORDER = "order"  # the score a slate is ordered by, whatever stage gave it
_NO_ITEMS = np.empty(0, np.int64)
_ALL_ITEMS = 1 << 31
_FILL_ITEMS = 4_096


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
    fusion: Fusion
    hydrator: Hydrator
    filters: Sequence[Filter]
    stock_filters: Sequence[Filter]
    live_filters: Sequence[Filter]  # asked of every source's list, and once more of every slate
    selector: Selector
    popular: RankedList
    slates: LastSlates
    scorer: Scorer | None = None
    reranker: Reranker | None = None
    rerank_weights: RerankWeights = NO_SAY
    versions: Mapping[str, str]  # of what stays: the run, the feature views
    budget: Budget
    config: PipelineConfig
    owned: Sequence[Callable[[], None]] = ()
    health: Health = field(default_factory=Health)

    def under(self, arm: Arm) -> Cascade:
        """The same parts for an arm that asks for less of them: fewer feeds or stages, another depth."""
        weights = {f.source: f.weight for f in arm.feeds}
        ranks, reranks = arm.order != "source", arm.order == "rerank"
        return replace(
            self,
            arm=arm,
            sources=[s for s in self.sources if s.name in weights],
            fusion=self.fusion if arm.feeds == self.arm.feeds else Fusion(weights, weights),
            scorer=self.scorer if ranks else None,
            reranker=self.reranker if reranks else None,
        )

    def versions_now(self) -> dict[str, str]:
        """Part to version, of the stages as they answered last."""
        stages = {"ranker": self.scorer, "reranker": self.reranker}
        return {**self.versions, **{name: stage.version for name, stage in stages.items() if stage is not None}}

    async def recommend(self, query: Query, deadline: Deadline) -> Slate:
        """A slate from the best tier that the stages and the deadline allow.

        Raises: BadInput for a limit out of range, DeadlineExceeded when no time is left on arrival. Any later failure
        falls through to the next tier, counted with its reason.
        """
        self._check(query)
        deadline.require("recommend")
        trace = Trace(self.health)
        user = await trace.attempt(
            "user",
            (stage := self.budget.stage("user", deadline)),
            self.features.user(query.user_id, query.as_of_us, stage),
        )
        if user is None:
            return self._without_user(query, trace)
        if user.status == FeatureStatus.NOT_FOUND:
            self.slates.forget(query)
        found = await self._retrieve(query, user, deadline, trace)
        found, features = await self._hydrate(query, user, found, deadline, trace)
        if not len(found) and trace.fallbacks:
            return self._without_user(query, trace)
        # Where nothing passes the filters, no stage had anything to say, and none fell through.
        score, tier = found.score(RETRIEVAL), max(self.arm.tier, Tier.RETRIEVAL) if len(found) else self.arm.tier
        if self.scorer is not None and features is not None and len(found):
            ranked = await self._rank(query, user, found, features, deadline, trace)
            if ranked is not None:
                found, score, tier = found.with_score("rank", ranked), ranked, Tier.RANK
                if self.reranker is not None:
                    reranked = await self._rerank(query, user, found, features, deadline, trace)
                    if reranked is not None:
                        weight = self.rerank_weights.of(query)
                        score = blend(ranked, reranked, weight) if weight else ranked
                        found, tier = found.with_score("rerank", reranked), Tier.FULL
        spare = await self._spare(query, user, found, deadline, trace)
        return self._answer(query, user, found, score, tier, trace, spare)

    async def collect(self, query: Query, deadline: Deadline) -> Collected:
        """Everything before scoring, for training lists and labels.

        Raises: Unavailable when any stage fell through: a training list with a source missing would teach a lie.
        """
        self._check(query)
        trace = Trace(self.health)
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
        """Ask every source at once; what fails or is late is left out. Then drop what must not be shown, and fuse.

        Nothing here depends on the limit, so that a longer slate begins with the shorter one.
        """
        stage = self.budget.stage("sources", deadline)
        banned = keys({*query.exclude, *query.cart, query.current_item} - {""})
        ask = self.config.source_items_max + len(banned)
        # What the request does not ask for is no reason to give less: who cannot look for the rest lists everything.
        everything = _ALL_ITEMS if query.where.restricts else ask
        asks = [ask if isinstance(s, SearchesWhere) else everything for s in self.sources]
        until = [self.budget.source(s.name, stage) for s in self.sources]

        async def listed(s: CandidateSource, most: int, own: Deadline) -> Candidates | None:
            # Called here, in the task that awaits it: one that is cancelled before it begins leaves nothing unawaited.
            return await trace.attempt(s.name, self.budget.given_up(own, deadline), s.retrieve(query, user, most, own))

        lists = await asyncio.gather(*map(listed, self.sources, asks, until))
        start_s = time.monotonic()
        given = [c.take(~np.isin(c.item_key, banned)) if len(banned) else c for c in lists if c is not None]
        # What is sold out must not use up a source's quota.
        given = [self._filtered(self.live_filters, query, user, c, None) for c in given]
        union = merge(given, {f.source: f.quota for f in self.arm.feeds})
        found = self._filtered(self.filters, query, user, union, None)
        weights = self.fusion.of(new_only=query.new_only)
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

    async def _spare(
        self, query: Query, user: UserFeatures, found: Candidates, deadline: Deadline, trace: Trace
    ) -> Candidates | None:
        """Items to fill a short slate with, below what was ordered and without a say in it.

        None for an arm without the popular source: it is to show what its own find.
        """
        short = query.limit - len(found)
        if short <= 0 or all(f.source != popular.NAME for f in self.arm.feeds):
            return None
        more = self._fill(query, user, 2 * short, found.item_key)
        if len(more):
            more, _ = await self._hydrate(query, user, more, deadline, trace)
        return more

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
        if scores is None or _usable("rank", scores, trace) is None:
            return None
        trace.versions["ranker"] = self.scorer.version  # before another request's answer can come from another version
        return scores

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
        trace.versions["reranker"] = result.version
        scores = np.full(len(found), np.nan, np.float32)
        scores[rows] = result.scores
        return scores

    def _without_user(self, query: Query, trace: Trace) -> Slate:
        """The last two tiers: the user's last slate, else what is popular; both filtered again."""
        nobody = UserFeatures.not_found(query.user_id, query.as_of_us)
        cached = self.slates.get(query)
        if cached is not None:
            found = self._filtered((*self.filters, *self.live_filters), query, nobody, cached, None)
            if len(found):
                return self._answer(query, nobody, found, found.score("slate"), Tier.CACHED, trace)
        found = self._most_popular(query, nobody, query.limit)
        return self._answer(query, nobody, found, found.score("popular"), Tier.POPULAR, trace)

    def _fill(self, query: Query, user: UserFeatures, wanted: int, besides: npt.NDArray[np.int64]) -> Candidates:
        """Popular items, and where a request asks for others than those, whatever the catalogue has of its kind."""
        found = self._most_popular(query, user, wanted, besides)
        if len(found) == wanted or not query.where.restricts:
            return found
        matching = self.catalogue.matching(query.where)
        matching = matching[~np.isin(matching, np.concatenate([besides, found.item_key]))]
        for start in range(0, len(matching), _FILL_ITEMS):
            some = matching[start : start + _FILL_ITEMS]
            more = Candidates.from_source("matching", some, np.zeros(len(some), np.float32))
            more = self._filtered((*self.filters, *self.live_filters), query, user, more, None)
            found = append(found, more.take(np.arange(min(wanted - len(found), len(more)))))
            if len(found) == wanted:
                break
        return found

    def _most_popular(
        self, query: Query, user: UserFeatures, wanted: int, besides: npt.NDArray[np.int64] = _NO_ITEMS
    ) -> Candidates:
        """The first `wanted` popular items that may be shown and are not in `besides`; fewer where the list ends."""
        ask = wanted + len(besides) + len(query.exclude) + len(query.cart) + 1
        while True:
            head = self.popular.head(query, user, ask)
            found = self._filtered((*self.filters, *self.live_filters), query, user, head, None)
            found = found.take(~np.isin(found.item_key, besides))
            if len(found) >= wanted or len(head) < ask:
                return found.take(np.arange(min(wanted, len(found))))
            ask *= 4

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
        self,
        query: Query,
        user: UserFeatures,
        found: Candidates,
        score: Scores,
        tier: Tier,
        trace: Trace,
        spare: Candidates | None = None,
    ) -> Slate:
        """Look once more at what may be sold, order and cut; `spare` fills up what is missing."""
        start_s = time.monotonic()
        now = self._filtered(self.live_filters, query, user, found.with_score(_ORDER, score), None)
        selection = self.selector.select(query, now, now.score(_ORDER), query.limit)
        shown, propensity = now.take(selection.rows), selection.propensity
        if spare is None and tier >= Tier.CACHED and len(shown) < query.limit:
            spare = self._fill(query, user, query.limit - len(shown), shown.item_key)
        if spare is not None:
            more = self._filtered(self.live_filters, query, user, spare, None)
            more = more.take(np.arange(min(query.limit - len(shown), len(more))))
            order = shown.score(_ORDER)
            lowest = order[np.isfinite(order)].min(initial=np.float32(0))
            shown = append(shown, more.with_score(_ORDER, lowest - np.arange(1, len(more) + 1, dtype=np.float32)))
            propensity = np.append(propensity, np.ones(len(more), np.float32))
        items = slate_items(user, shown, shown.score(_ORDER), propensity, self.catalogue)
        if tier < Tier.CACHED and not query.where.restricts:
            places = -np.arange(len(shown), dtype=np.float32)
            known = user.status != FeatureStatus.NOT_FOUND
            self.slates.put(query, shown.with_score("slate", places), of_a_past=known)
        trace.done("select", start_s, "ok", len(found), len(items))
        return Slate(
            request_id=query.request_id,
            items=items,
            tier=tier,
            timings=tuple(trace.timings),
            fallbacks=tuple(trace.fallbacks),
            versions={**self.versions, **trace.versions},
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
