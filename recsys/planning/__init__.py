"""Estimates before the day: capacity from a load report, autoscaling from the capacity plan, embedding placement.

`embeddings` imports TorchRec and is imported by its command only.
"""

from recsys.planning.autoscale import Schedule, manifests
from recsys.planning.capacity import CapacityPlan, RolePlan, capacity_plan

__all__ = ["CapacityPlan", "RolePlan", "Schedule", "capacity_plan", "manifests"]
