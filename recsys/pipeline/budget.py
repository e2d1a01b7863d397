"""Deadline budget: how the time that is left is split between the stages. The only caller of `Deadline.capped`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recsys.core import Deadline
from recsys.core.config import in_range, section


@section("pipeline.budget")
@dataclass(frozen=True, kw_only=True)
class Budget:
    """Each stage may use its share of what is left when it starts, after `reserve_ms` for selecting and answering.

    Shares of the remainder, not fixed times: what one stage saves, the later ones have, and a shopper with a short
    deadline gets the same proportions.
    """

    reserve_ms: float = 3.0
    user: float = 0.3
    sources: float = 0.4
    hydrate: float = 0.3
    rank: float = 0.5
    rerank: float = 0.95

    def __post_init__(self) -> None:
        in_range("pipeline.budget.reserve_ms", self.reserve_ms, 0.0, 10_000.0)
        for stage in ("user", "sources", "hydrate", "rank", "rerank"):
            in_range(f"pipeline.budget.{stage}", getattr(self, stage), 0.01, 1.0)

    def stage(self, stage: str, deadline: Deadline) -> Deadline:
        """The deadline of one stage, never later than the request's."""
        left_ms = deadline.remaining_ms()
        if math.isinf(left_ms):
            return deadline
        return deadline.capped(max(0.0, left_ms - self.reserve_ms) * float(getattr(self, stage)))
