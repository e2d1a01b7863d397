"""Build a cascade: the only code that knows which class stands behind which name."""

from __future__ import annotations

import json
from collections.abc import Callable

from recsys.candidates import (
    CandidateSource,
    buy_again,
    covisit,
    just_listed,
    new_arrivals,
    own_history,
    own_history_popular,
    popular,
    regression,
    swing,
    text_similar,
    trending,
    user_knn,
)
from recsys.candidates.buy_again import BuyAgain
from recsys.candidates.covisit import Covisit
from recsys.candidates.fusion import FILE as FUSION_FILE
from recsys.candidates.fusion import Fusion
from recsys.candidates.just_listed import JustListed
from recsys.candidates.linked import Linked
from recsys.candidates.own_history import OwnHistory
from recsys.candidates.own_history_popular import OwnHistoryPopular
from recsys.candidates.ranked_list import RankedList
from recsys.candidates.trending import Trending
from recsys.candidates.user_knn import UserKnn
from recsys.core import BadInput, RunDirectory, VersionMismatch
from recsys.core.attributes import attributes_of
from recsys.core.items import ItemTable
from recsys.core.logging import get_logger
from recsys.pipeline.arms import ARMS, Arm
from recsys.pipeline.budget import Budget
from recsys.pipeline.cache import LastSlates
from recsys.pipeline.ports import NO_SAY, PipelineConfig, Ports, RerankWeights
from recsys.pipeline.recommend import Cascade
from recsys.ranking import Scorer
from recsys.ranking.catalogue import Catalogue
from recsys.ranking.diversify import TopSelector
from recsys.ranking.filter import Available, Delisted, Excluded, NotAskedFor, SoldOut, Touched, Unlisted
from recsys.ranking.hydrate import FeatureHydrator
from recsys.ranking.titles import Titles

_log = get_logger(__name__)
DEFAULT_PIPELINE = PipelineConfig()
DEFAULT_BUDGET = Budget()


def build(
    arm: str | Arm,
    run: RunDirectory,
    ports: Ports,
    *,
    config: PipelineConfig = DEFAULT_PIPELINE,
    budget: Budget = DEFAULT_BUDGET,
    fusion: Fusion | None = None,
) -> Cascade:
    """The cascade of an arm over a run.

    A source whose index the run does not have is left out, with a log line: windows of the stacked rule have no ann.
    fusion: how its sources count; None = as the run learnt it, or by the arm's own weights where it did not.
    Raises: BadInput for an unknown arm; VersionMismatch when the run was trained on other feature views or ranker
    features than this process reads; NotFound, CorruptData for files of the run.
    """
    arm = _named(arm) if isinstance(arm, str) else arm
    if (trained := str(run.manifest["feature_views"])) != ports.features.view_set:
        raise VersionMismatch(
            f"feature views of run {run.run_id}",
            came=trained,
            expected=f"{ports.features.view_set}, those of the feature store",
            fix="Train again with this release, or refold the store with the release that trained the run.",
        )
    catalogue = Catalogue(ItemTable.read(run.path("items.parquet")), ports.live, Titles.load(run))
    fallback = RankedList.read(popular.NAME, run.path(f"index/{popular.NAME}.parquet"), ports.rows)
    sources = [_source(f.source, run, ports, fallback, catalogue) for f in arm.feeds]
    scorer = reranker = None
    weights, owned = None, list[Callable[[], None]]()
    if arm.order in ("rank", "rerank"):
        scorer = ports.scorer or _local_scorer(run)
    if arm.order == "rerank":
        reranker, weights = ports.reranker, ports.rerank_weights
        version = _reranker_version(run) if reranker is None or weights is None else reranker.version
        if reranker is None:
            from llm_reranker.local import LocalReranker  # heavy

            local = LocalReranker.load(run, version)
            reranker, owned = local, [local.close]
        weights = weights or _rerank_weights(run, version)
    return Cascade(
        arm=arm,
        catalogue=catalogue,
        features=ports.features,
        sources=[s for s in sources if s is not None],
        fusion=fusion or _fusion(arm, run),
        hydrator=FeatureHydrator(ports.features, catalogue),
        filters=(Unlisted(catalogue), Excluded(), Touched()),
        stock_filters=(SoldOut(ports.live), Delisted(ports.live)),
        live_filters=(Available(catalogue.live), NotAskedFor(catalogue)),
        selector=TopSelector(catalogue, arm.category_items_max),
        popular=fallback,
        slates=LastSlates(config.cached_users_max, config.cached_items_max, config.cached_age_s_max),
        scorer=scorer,
        reranker=reranker,
        rerank_weights=weights or NO_SAY,
        versions={"run": run.run_id, "views": ports.features.view_set},
        budget=budget,
        config=config,
        owned=owned,
    )


def _fusion(arm: Arm, run: RunDirectory) -> Fusion:
    """An arm's own weights, those of the run instead where several sources are to be fused."""
    own = {f.source: f.weight for f in arm.feeds}
    learnt = Fusion.load(run) if len(own) > 1 and run.has(FUSION_FILE) else Fusion(own, own)
    return Fusion(*({**own, **{n: w for n, w in of.items() if n in own}} for of in (learnt.all, learnt.new_only)))


def _named(name: str) -> Arm:
    if name not in ARMS:
        raise BadInput("arm", came=name, expected=f"one of {', '.join(ARMS)}", fix="Correct the name.")
    return ARMS[name]


def _source(
    name: str, run: RunDirectory, ports: Ports, fallback: RankedList, catalogue: Catalogue
) -> CandidateSource | None:
    """The source behind a name; None when it needs an index that the run does not have, or a catalogue stream."""
    if name in ports.sources:
        return ports.sources[name]
    if name == "ann" and ports.ann is not None:
        return ports.ann
    file = {"ann": "index/ann.faiss"}.get(name, f"index/{name}.parquet")
    makers: dict[str, Callable[[], CandidateSource]] = {
        own_history.NAME: OwnHistory,
        own_history_popular.NAME: lambda: OwnHistoryPopular(fallback),
        popular.NAME: lambda: fallback,
        just_listed.NAME: lambda: JustListed(catalogue.live.new_items),
    }
    indexed: dict[str, Callable[[], CandidateSource]] = {
        covisit.NAME: lambda: Covisit.read(run.path(file), covisit.config_of(run)),
        swing.NAME: lambda: Linked.load(name, run.path(file), covisit.config_of(run).memory, ports.rows),
        regression.NAME: lambda: Linked.load(name, run.path(file), regression.MEMORY),
        text_similar.NAME: lambda: Linked.load(name, run.path(file), text_similar.MEMORY),
        user_knn.NAME: lambda: UserKnn.read(run.path(file)),
        buy_again.NAME: lambda: BuyAgain.read(run.path(file)),
        trending.NAME: lambda: Trending.read(run.path(file), catalogue.live.category_key, ports.rows),
        new_arrivals.NAME: lambda: RankedList.read(name, run.path(file)),
        "ann": lambda: _local_ann(run, catalogue.items),
    }
    if name == just_listed.NAME and ports.live is None:
        return None
    if name in makers:
        return makers[name]()
    if name not in indexed:
        raise BadInput("arm, source", came=name, expected=f"one of {[*makers, *indexed]}", fix="Correct the name.")
    if not run.has(file):
        _log.warning("source_left_out", source=name, run=run.run_id, missing=file)
        return None
    return indexed[name]()


def _local_ann(run: RunDirectory, items: ItemTable) -> CandidateSource:
    from recsys.candidates.ann import LocalAnnSource  # heavy
    from recsys.candidates.nearest.live import LiveIndex  # heavy
    from recsys.candidates.nearest.static import AnnIndex  # heavy
    from recsys.models.tower import Tower  # heavy

    base = AnnIndex.load(run)
    return LocalAnnSource(Tower.load(run), LiveIndex(base, attributes_of(items, base.row_key)))


def _local_scorer(run: RunDirectory) -> Scorer:
    from recsys.models.ranker import Ranker  # heavy
    from recsys.ranking.score import LocalScorer

    return LocalScorer(Ranker.load(run))


def _reranker_version(run: RunDirectory) -> str:
    versions = run.reranker_versions()
    if not versions:
        raise VersionMismatch(
            f"run {run.run_id}, reranker",
            came="none",
            expected="a folder reranker/VERSION",
            fix=f"Distil one: double11 distill DIR --run {run.root}, or use arm rank.",
        )
    return versions[-1]


def _rerank_weights(run: RunDirectory, version: str) -> RerankWeights:
    facts = json.loads(run.path(f"reranker/{version}/double11.json").read_text("utf-8"))
    return RerankWeights(all=float(facts["blend_weight"]), new_only=float(facts["blend_weight_new_only"]))
