"""RecommendationService: one request on one screen, from the wire to the impression record."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import grpc
from double11.v1 import recommend_pb2 as pb
from double11.v1 import recommend_pb2_grpc as pb_grpc

from recsys.core import Clock, Deadline, Double11Error, Query, Slate, metrics
from recsys.pipeline import Cascade
from recsys.serving.admission import Admission
from recsys.serving.config import ServingConfig
from recsys.serving.impressions import Impressions
from recsys.serving.requests import to_query, to_response
from recsys.serving.wire import deadline_of

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class InForce:
    """The cascade that answers now.

    lowered_by: the peak plan that keeps it below the arm's best tier, or "". behind: whether its view of the catalogue
    is too old.
    """

    cascade: Cascade
    lowered_by: str = ""
    behind: bool = False


class RecommendService(pb_grpc.RecommendationServiceServicer):
    """validate -> admit -> pipeline -> respond, with one Deadline made at receipt."""

    def __init__(
        self,
        in_force: Callable[[], InForce],
        clock: Clock,
        admission: Admission,
        impressions: Impressions,
        config: ServingConfig,
    ) -> None:
        """in_force: asked at every request, so that a peak plan can exchange the cascade between two."""
        self._in_force, self._clock = in_force, clock
        self._admission, self._impressions, self._config = admission, impressions, config
        self.responses_by_tier: Counter[str] = Counter()

    async def Recommend(  # noqa: N802
        self, request: pb.RecommendRequest, context: Context
    ) -> pb.RecommendResponse:
        """A slate within the caller's deadline. Statuses: see recommend.proto."""
        received_s = time.monotonic()
        remaining_s = context.time_remaining()
        waits_until_s = math.inf if remaining_s is None else received_s + remaining_s
        deadline = deadline_of(context, self._config.deadline_ms_default, self._config.deadline_ms_max)
        tier, status = "none", "UNKNOWN"  # what gRPC says about a bug of ours
        try:
            deadline.require("Recommend")
            query = to_query(request, self._clock.now_us())
            async with self._admission.admitted(query.priority, deadline):
                slate = await self._answer(query, deadline)
            response = to_response(slate, self._in_force().cascade.catalogue)
            tier, status = slate.tier.label, "OK"
        except Double11Error as error:
            status = error.grpc_status
            raise
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        finally:
            metrics.REQUESTS.labels(tier, status).inc()
            metrics.REQUEST_MS.labels(tier).observe((time.monotonic() - received_s) * 1e3)
        # The stubs ask for a class of theirs where gRPC takes any callable.
        context.add_done_callback(lambda call: self._sent(query, slate, call, waits_until_s))  # type: ignore[arg-type]
        self.responses_by_tier[tier] += 1
        return response

    def _sent(self, query: Query, slate: Slate, call: Context, waits_until_s: float) -> None:
        """The call is over: a slate was shown unless its caller hung up, or its time ran out, before gRPC took it."""
        if call.cancelled() or time.monotonic() >= waits_until_s:
            self._impressions.not_shown()
        else:
            self._impressions.record(query, slate)

    async def _answer(self, query: Query, deadline: Deadline) -> Slate:
        in_force = self._in_force()
        slate = await in_force.cascade.recommend(query, deadline)
        reasons = [("peak", in_force.lowered_by)] if in_force.lowered_by else []
        reasons += [("catalog", "behind")] if in_force.behind else []
        for stage, reason in reasons:
            metrics.FALLBACKS.labels(stage, reason).inc()
        return replace(slate, fallbacks=(*slate.fallbacks, *map(":".join, reasons))) if reasons else slate
