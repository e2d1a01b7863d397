"""The peers by name: their arms, and the ports through which the pipeline reaches them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from llm_reranker import Reranker
from recsys.candidates import CandidateSource
from recsys.core import RunDirectory
from recsys.data import Dataset
from recsys.pipeline import ARMS, Arm, Feed, RerankWeights
from recsys.ranking import Scorer
from recsys.replay.peers import ease, factors, tifu_knn
from recsys.replay.peers.base import Interactions, PeerSource

_FITS: Mapping[str, Callable[[Interactions, int], PeerSource]] = MappingProxyType(
    {"als": factors.als, "bpr": factors.bpr, "ease": ease.ease, "tifu_knn": tifu_knn.tifu_knn}
)
_TREES, _NO_LLM = "lambdamart", "full_nollm"

PEER_ARMS: Mapping[str, Arm] = MappingProxyType(
    {name: Arm(name=name, feeds=(Feed(source=name, quota=1_000),)) for name in _FITS}
    | {_TREES: replace(ARMS["rank"], name=_TREES), _NO_LLM: replace(ARMS["full"], name=_NO_LLM)}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """Fitted peers, by arm.

    sources: of single-source arms; scorers: of arms that order the run's candidates; rerankers: of arms that reorder
    the ranker's best, with their say in it.
    """

    sources: Mapping[str, CandidateSource] = field(default_factory=dict)
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    rerankers: Mapping[str, tuple[Reranker, RerankWeights]] = field(default_factory=dict)


NO_PEERS = Peers()


def fit_peers(arms: Sequence[str], dataset: Dataset, run: RunDirectory, from_us: int, seed: int) -> Peers:
    """Fit what `arms` names of PEER_ARMS on events that had happened and were known before `from_us`.

    Raises: BadInput when the extra `peers` is not installed.
    """
    named = [arm for arm in arms if arm in _FITS]
    sources = {}
    if named:
        known = dataset.events(known_before_us=from_us)
        seen = Interactions.of(known, dataset.item_table(before_us=from_us), from_us)
        sources = {name: _FITS[name](seen, seed) for name in named}
    scorers: dict[str, Scorer] = {}
    if _TREES in arms:
        from recsys.replay.peers import lambdamart  # heavy

        scorers[_TREES] = lambdamart.fit(dataset, run, seed)
    rerankers: dict[str, tuple[Reranker, RerankWeights]] = {}
    if _NO_LLM in arms:
        from recsys.replay.peers import full_nollm  # heavy

        made = full_nollm.fit(dataset, run, seed)
        rerankers[_NO_LLM] = made, made.weights
    return Peers(sources=sources, scorers=scorers, rerankers=rerankers)
