"""Deadline budget: how the time that is left is split between the stages. The only caller of `Deadline.capped`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recsys.core import BadInput, Deadline
from recsys.core.config import in_range, section
from recsys.pipeline.arms import ARMS

_MS_MAX = 60_000.0
_GRACE = 0.25


@section("pipeline.budget")
@dataclass(frozen=True, kw_only=True)
class Budget:
    """Each stage may use its share of what is left when it starts, after `reserve_ms` for selecting and answering.

    Shares of the remainder, not fixed times: what one stage saves, the later ones have, and a shopper with a short
    deadline gets the same proportions.

    source_ms_max: candidate source to milliseconds, `[pipeline.budget.source_ms_max]`: it is given up then, and the
    others' results go on. A source that is not named has all of the stage's time. What computes in the gateway cannot
    be interrupted; this is for sources that wait for another process.
    """

    reserve_ms: float = 3.0
    user: float = 0.3
    sources: float = 0.4
    hydrate: float = 0.3
    rank: float = 0.5
    rerank: float = 0.95
    source_ms_max: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        in_range("pipeline.budget.reserve_ms", self.reserve_ms, 0.0, 10_000.0)
        for stage in ("user", "sources", "hydrate", "rank", "rerank"):
            in_range(f"pipeline.budget.{stage}", getattr(self, stage), 0.01, 1.0)
        for name, ms in self.source_ms_max.items():
            _check_source(f"pipeline.budget.source_ms_max.{name}", name, ms)

    def stage(self, stage: str, deadline: Deadline) -> Deadline:
        """The deadline of one stage, never later than the request's."""
        left_ms = deadline.remaining_ms()
        if math.isinf(left_ms):
            return deadline
        return deadline.capped(max(0.0, left_ms - self.reserve_ms) * float(getattr(self, stage)))

    def source(self, name: str, stage: Deadline) -> Deadline:
        """The deadline of one candidate source, never later than that of the stage. Offline callers have no limit."""
        ms = self.source_ms_max.get(name)
        return stage if ms is None or math.isinf(stage.at_s) else stage.capped(float(ms))

    def given_up(self, source: Deadline, request: Deadline) -> Deadline:
        """When a source that does not keep its deadline is given up, within the request's: a quarter of its time later.

        One that keeps it comes back at its end with what it has (`recsys.serving.remote`: without the shards that are
        late); on a busy event loop that takes some milliseconds more.
        """
        left_ms = source.remaining_ms()
        return source if math.isinf(left_ms) else request.capped(max(0.0, left_ms * (1 + _GRACE)))


def _check_source(what: str, name: str, ms: Any) -> None:
    known = sorted({f.source for arm in ARMS.values() for f in arm.feeds})
    if name not in known:
        raise BadInput(f"configuration {what}", came=name, expected=f"one of {', '.join(known)}", fix="Correct it.")
    if type(ms) not in (int, float):
        raise BadInput(f"configuration {what}", came=ms, expected="milliseconds, a number", fix="Correct it.")
    in_range(what, ms, 0.1, _MS_MAX)
