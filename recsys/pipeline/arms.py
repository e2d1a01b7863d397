"""Arms: named configurations of the cascade. What replay compares and serving serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from llm_reranker.config import DEPTH
from recsys.core import Tier
from recsys.core.config import in_range


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """How much one source may put into the union.

    source: its name. quota: items at most; where `popular` is a feed, slates are filled up with it beyond its quota.
    weight: its say in the order of the retrieval tier (recsys.candidates.fusion), until a run has learnt it. absolute:
    its score counts something and is no place among others.
    """

    source: str
    quota: int
    weight: float = 1.0
    absolute: bool = False

    def __post_init__(self) -> None:
        in_range(f"arm, feed {self.source}, quota", self.quota, 1, 10_000)
        in_range(f"arm, feed {self.source}, weight", self.weight, 0.0, 1e6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One configuration.

    order: "source" sorts by the sources' fused scores, "rank" by the ranker, "rerank" by ranker and LLM blended.
    rerank_depth: candidates that the reranker sees. category_items_max: soft cap per category in a slate, 0 = none.
    """

    name: str
    feeds: tuple[Feed, ...]
    order: Literal["source", "rank", "rerank"] = "source"
    rerank_depth: int = DEPTH
    category_items_max: int = 0

    def __post_init__(self) -> None:
        in_range(f"arm {self.name}, feeds", len(self.feeds), 1, 32)
        in_range(f"arm {self.name}, rerank_depth", self.rerank_depth, 1, 1_000)
        in_range(f"arm {self.name}, category_items_max", self.category_items_max, 0, 1_000)

    @property
    def tier(self) -> Tier:
        """The best tier the arm can answer with."""
        if self.order != "source":
            return Tier.FULL if self.order == "rerank" else Tier.RANK
        return Tier.POPULAR if {f.source for f in self.feeds} == {"popular"} else Tier.RETRIEVAL


_CASCADE = (
    Feed(source="own_history", quota=150, absolute=True),
    Feed(source="buy_again", quota=100, weight=0.3),
    Feed(source="covisit", quota=120, weight=0.3),
    Feed(source="swing", quota=80, weight=0.5),
    Feed(source="regression", quota=80, weight=0.5),
    Feed(source="user_knn", quota=80, weight=0.5),
    Feed(source="text_similar", quota=40, weight=0.1),
    Feed(source="ann", quota=60, weight=0.3),
    Feed(source="trending", quota=40, weight=0.3),
    Feed(source="popular", quota=100, weight=0.5),
    Feed(source="new_arrivals", quota=40, weight=0.05),
    Feed(source="just_listed", quota=20, weight=0.05),
)


def _single(name: str, source: str) -> Arm:
    return Arm(name=name, feeds=(Feed(source=source, quota=500),))


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        arm.name: arm
        for arm in (
            _single("popular", "popular"),
            _single("own_history", "own_history"),
            _single("own_history_popular", "own_history_popular"),
            _single("item_knn", "covisit"),
            Arm(name="retrieval", feeds=_CASCADE),
            Arm(name="rank", feeds=_CASCADE, order="rank"),
            Arm(name="full", feeds=_CASCADE, order="rerank"),
        )
    }
)
