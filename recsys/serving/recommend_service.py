"""RecommendationService: one request on one screen, from the wire to the impression record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import grpc
from double11.v1 import recommend_pb2 as pb
from double11.v1 import recommend_pb2_grpc as pb_grpc

from recsys.core import Clock, Deadline, Double11Error, Query, Slate, logging, metrics
from recsys.core.items import ItemTable
from recsys.serving.admission import Admission
from recsys.serving.config import ServingConfig
from recsys.serving.impressions import Impressions
from recsys.serving.requests import to_query, to_response
from recsys.serving.wire import deadline_of

_log = logging.get_logger(__name__)


class Recommends(Protocol):
    """The pipeline, as this service uses it."""

    async def recommend(self, query: Query, deadline: Deadline) -> Slate:
        """The best slate that fits the deadline."""
        ...


class RecommendService(pb_grpc.RecommendationServiceServicer):
    """validate -> admit -> pipeline -> respond, with one Deadline made at receipt."""

    def __init__(
        self,
        cascade: Callable[[], Recommends],
        items: ItemTable,
        clock: Clock,
        admission: Admission,
        impressions: Impressions,
        config: ServingConfig,
    ) -> None:
        """cascade: gives the cascade in force, so that a peak plan can exchange it between two requests."""
        self._cascade, self._items, self._clock = cascade, items, clock
        self._admission, self._impressions, self._config = admission, impressions, config
        self.responses_by_tier: Counter[str] = Counter()

    async def Recommend(  # noqa: N802
        self, request: pb.RecommendRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RecommendResponse:
        """A slate within the caller's deadline. Statuses: see recommend.proto."""
        received_s = time.monotonic()
        deadline = deadline_of(context, self._config.deadline_ms_default, self._config.deadline_ms_max)
        tier, status = "none", "CANCELLED"  # what stands when the caller goes away
        try:
            deadline.require("Recommend")
            query = to_query(request, self._clock.now_us())
            async with self._admission.admitted(query.priority, deadline):
                slate = await self._cascade().recommend(query, deadline)
            response = to_response(slate, self._items)
            tier, status = slate.tier.label, "OK"
        except Double11Error as error:
            status = error.grpc_status
            raise
        finally:
            metrics.REQUESTS.labels(tier, status).inc()
            metrics.REQUEST_MS.labels(tier).observe((time.monotonic() - received_s) * 1e3)
        self._impressions.record(query, slate)
        self.responses_by_tier[tier] += 1
        return response
