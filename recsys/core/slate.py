"""Slate: the answer to a Query, with the provenance of every item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class Tier(IntEnum):
    """How far a request got; the numbers are those of recommend.proto. Lower is better."""

    FULL = 1
    RANK = 2
    RETRIEVAL = 3
    CACHED = 4
    POPULAR = 5

    @property
    def label(self) -> str:
        """Lower-case word for logs, metrics and reports."""
        return self.name.lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class SlateItem:
    """One item of a slate.

    score: the score it was ordered by. sources: candidate sources that gave it. reason: a short word a storefront
    can turn into text ("bought before"). propensity: probability of being shown at this place, 1.0 without exploration.
    stage_scores: score per stage and source, NaN left out.
    """

    item_id: str
    item_key: int
    score: float
    sources: tuple[str, ...] = ()
    reason: str = ""
    propensity: float = 1.0
    stage_scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTiming:
    """Wall time of one stage: start is milliseconds after receipt, `outcome` is ok, skipped, timeout or error."""

    stage: str
    start_ms: float
    duration_ms: float
    outcome: str = "ok"
    items_in: int = 0
    items_out: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Slate:
    """Ordered items, best first, and how they came about.

    fallbacks: why the tier is not the arm's best, e.g. ("rerank:timeout",); empty when nothing fell through.
    versions: model and feature versions that answered, by part.
    """

    request_id: str
    items: tuple[SlateItem, ...]
    tier: Tier
    timings: tuple[StageTiming, ...] = ()
    fallbacks: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
