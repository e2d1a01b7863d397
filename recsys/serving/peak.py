"""The peak plan in force: prepared limits and tiers, put in force and taken back at once, without a restart."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from recsys.core import NotFound, logging
from recsys.serving.admission import Admission
from recsys.serving.config import PeakPlan

_log = logging.get_logger(__name__)
NO_PLAN = PeakPlan(name="")


class Peak:
    """At most one plan is in force; activating another replaces it."""

    def __init__(
        self, plans: Mapping[str, PeakPlan], admission: Admission, use_cascade: Callable[[PeakPlan], None]
    ) -> None:
        """use_cascade: exchanges the cascade for one with the plan's tier and rerank depth."""
        self.plans = plans
        self.active = NO_PLAN
        self._admission, self._use_cascade = admission, use_cascade
        self._configured_limit = admission.limit

    def activate(self, name: str) -> PeakPlan:
        """Put a prepared plan in force.

        Raises: NotFound.
        """
        if name not in self.plans:
            raise NotFound(
                "peak plan",
                came=name,
                expected=f"one of {', '.join(sorted(self.plans)) or 'none prepared'}",
                fix="Prepare it in double11.toml as [serving.peak.plans.NAME] and restart the gateway.",
            )
        self._use(self.plans[name])
        return self.active

    def revert(self) -> str:
        """Back to the configured limits and tiers; returns the name of the plan that was in force, or ""."""
        reverted = self.active.name
        self._use(NO_PLAN)
        return reverted

    def _use(self, plan: PeakPlan) -> None:
        self._use_cascade(plan)
        limit = plan.in_flight_limit or self._configured_limit
        _log.warning("peak_plan_changed", was=self.active.name, now=plan.name, in_flight_limit=limit)
        self._admission.limit, self.active = limit, plan
