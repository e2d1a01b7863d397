"""AdminService: status and the peak plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
from double11.v1 import admin_pb2 as pb
from double11.v1 import admin_pb2_grpc as pb_grpc

from recsys.serving.config import PeakPlan
from recsys.serving.peak import Peak

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class AdminService(pb_grpc.AdminServiceServicer):
    """For operators."""

    def __init__(self, status: Callable[[], pb.GetStatusResponse], peak: Peak) -> None:
        """status: describes the gateway now."""
        self._status, self._peak = status, peak

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        """The state of this gateway."""
        return self._status()

    async def GetPeak(self, request: pb.GetPeakRequest, context: Context) -> pb.GetPeakResponse:  # noqa: N802
        """The prepared plans and the active one."""
        return pb.GetPeakResponse(plans=[_message(p) for p in self._peak.plans.values()], active=self._peak.active.name)

    async def ActivatePeak(  # noqa: N802
        self, request: pb.ActivatePeakRequest, context: Context
    ) -> pb.ActivatePeakResponse:
        """Put a plan in force. NOT_FOUND: no such plan."""
        return pb.ActivatePeakResponse(plan=_message(self._peak.activate(request.name)))

    async def RevertPeak(self, request: pb.RevertPeakRequest, context: Context) -> pb.RevertPeakResponse:  # noqa: N802
        """Back to the configuration."""
        return pb.RevertPeakResponse(reverted=self._peak.revert())


def _message(plan: PeakPlan) -> pb.PeakPlan:
    return pb.PeakPlan(
        name=plan.name,
        tier_best=int(plan.tier_best or 0),
        in_flight_limit=plan.in_flight_limit or 0,
        rerank_items_max=plan.rerank_items_max or 0,
    )
