"""Manifests that scale a deployment as a capacity plan says.

A step at midnight is met before it comes, not by reaction: from 10 to 100 pods the HorizontalPodAutoscaler takes 45 to
60 s under its default policies, and a model still has to load. So the replicas of the peak are there `lead` before it
starts (a KEDA cron trigger), and CPU usage adds to either level what the plan did not foresee.

Source: kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale (algorithm and default policies),
keda.sh/docs/2.21/scalers/cron.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from recsys.core import BadInput
from recsys.planning.capacity import CapacityPlan

_HPA = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
_SCALED_OBJECT = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject"}
_CPU_TARGET_PERCENT = 60  # usage of the request at which pods are added
_SURPRISE = 1.5  # ceiling above the planned peak
_BEHAVIOUR = {
    "scaleUp": {
        "stabilizationWindowSeconds": 0,
        "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
    },
    "scaleDown": {
        "stabilizationWindowSeconds": 300,
        "policies": [{"type": "Percent", "value": 25, "periodSeconds": 60}],
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """When the peak is. lead: how long before it the pods are asked for (start of pods and loading of models)."""

    start: datetime
    end: datetime
    lead: timedelta = timedelta(minutes=15)

    def __post_init__(self) -> None:
        early = self.start.year < 1970  # so that `lead` has somewhere to go
        if early or not timedelta(0) < self.end - self.start <= timedelta(days=30):
            came = f"{self.start.isoformat()} to {self.end.isoformat()}"
            expected = "a start from 1970 on, and an end after its start, within 30 days"
            raise BadInput("peak schedule", came=came, expected=expected, fix="Correct it.")


def manifests(
    plan: CapacityPlan,
    *,
    quiet_per_s: float,
    schedule: Schedule | None,
    shards: int = 1,
    namespace: str = "double11",
) -> list[dict[str, Any]]:
    """One scaler per deployment: a KEDA ScaledObject where there is a schedule, else a HorizontalPodAutoscaler (v2).

    quiet_per_s: requests per second of a usual hour; it sets the floor, at least 2 replicas, and the plan the ceiling.
    shards: of the item index; every request asks each, so each has the plan's scoring replicas.
    Raises: BadInput.
    """
    if not 0 < quiet_per_s <= plan.peak_per_s:
        raise BadInput(
            "--quiet-rate", came=quiet_per_s, expected=f"above 0, at most {plan.peak_per_s:g}", fix="Correct it."
        )
    found = []
    for role, needed in plan.roles.items():
        floor = max(2, math.ceil(needed.replicas * quiet_per_s / plan.peak_per_s))
        ceiling = max(floor, math.ceil(needed.replicas * _SURPRISE))
        names = [f"{role}-{i}" for i in range(shards)] if role == "scoring" and shards > 1 else [role]
        for name in names:
            metadata = {"name": name, "namespace": namespace}
            if schedule is None:
                head, spec = _HPA, _hpa(name, floor, ceiling)
            else:
                peak = max(floor, needed.replicas)
                head, spec = _SCALED_OBJECT, _scaled_object(name, floor, peak, ceiling, schedule)
            found.append({**head, "metadata": metadata, "spec": spec})
    return found


def _hpa(name: str, floor: int, ceiling: int) -> dict[str, Any]:
    target = {"type": "Utilization", "averageUtilization": _CPU_TARGET_PERCENT}
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicas": floor,
        "maxReplicas": ceiling,
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
        "behavior": _BEHAVIOUR,
    }


def _scaled_object(name: str, floor: int, peak: int, ceiling: int, schedule: Schedule) -> dict[str, Any]:
    cron = {
        "timezone": "Etc/UTC",
        "start": _cron(schedule.start - schedule.lead),
        "end": _cron(schedule.end),
        "desiredReplicas": str(peak),
    }
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
        "minReplicaCount": floor,
        "maxReplicaCount": ceiling,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _BEHAVIOUR}},
        "triggers": [
            {"type": "cron", "metadata": cron},
            {"type": "cpu", "metricType": "Utilization", "metadata": {"value": str(_CPU_TARGET_PERCENT)}},
        ],
    }


def _cron(at: datetime) -> str:
    """Minute, hour, day, month in UTC: once a year, so take the manifest down after the peak."""
    at = at.astimezone(UTC)
    return f"{at.minute} {at.hour} {at.day} {at.month} *"
