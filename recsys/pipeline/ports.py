"""Ports: what a cascade needs from outside: stores, workers, clock, randomness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from feature_store import FeatureReader
from llm_reranker import Reranker
from recsys.candidates import CandidateSource
from recsys.candidates.rows import FreshRows
from recsys.core import Clock, Query
from recsys.core.config import in_range, section
from recsys.ranking import Scorer
from recsys.ranking.live import LiveCatalogue


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """None for ann, scorer or reranker means: the in-process one of the run, imported only if the arm needs it.

    rerank_weights: of a reranker that is not the run's; None = those of the run's.
    sources: by name, used instead of the run's; where replay hands in what no run has.
    live: what the catalogue stream says now; None where there is none to follow, as in replay.
    rows: of indexes, that online training has made since the run; None where nobody follows it.
    """

    features: FeatureReader
    clock: Clock
    rng: np.random.Generator
    ann: CandidateSource | None = None
    scorer: Scorer | None = None
    reranker: Reranker | None = None
    rerank_weights: RerankWeights | None = None
    sources: Mapping[str, CandidateSource] = field(default_factory=dict)
    live: LiveCatalogue | None = None
    rows: FreshRows | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankWeights:
    """The reranker's say in the final order, chosen per task on validation; 0 = the ranker's order stands."""

    all: float = 0.0
    new_only: float = 0.0

    def of(self, query: Query) -> float:
        """The weight of the query's task."""
        return self.new_only if query.new_only else self.all


NO_SAY = RerankWeights()


@section("pipeline")
@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Bounds of one request.

    limit_max: longest slate. source_items_max: items asked of one source, so that its scores are known beyond its
    quota and what is sold out can be made up for. cached_users_max: users whose last slate is kept,
    0 = none. cached_items_max: items of these slates together, some 100 bytes each. cached_age_s_max: how long a
    slate is kept; a forgotten user's, too. rerank_history_max: past actions sent to the reranker.
    """

    limit_max: int = 1_000
    source_items_max: int = 500
    cached_users_max: int = 20_000
    cached_items_max: int = 1_000_000
    cached_age_s_max: float = 1_800.0
    rerank_history_max: int = 50

    def __post_init__(self) -> None:
        in_range("pipeline.limit_max", self.limit_max, 1, 10_000)
        in_range("pipeline.source_items_max", self.source_items_max, 1, 10_000)
        in_range("pipeline.cached_users_max", self.cached_users_max, 0, 10_000_000)
        in_range("pipeline.cached_items_max", self.cached_items_max, self.limit_max, 1_000_000_000)
        in_range("pipeline.cached_age_s_max", self.cached_age_s_max, 1, 86_400)
        in_range("pipeline.rerank_history_max", self.rerank_history_max, 0, 1_000)
