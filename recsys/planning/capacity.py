"""Replicas per role for a peak, from what a load run measured.

With N_r replicas of role r in the load run, and a_r = answers per second that needed the role and met their deadline
(the gateway answers all of them, scoring those of tier full, rank and retrieval, the reranker those of tier full):

    replicas_r = ceil( peak / ((1 - headroom) * a_r / N_r) )

A run with quiet stretches (shapes step and double11) was asked for little in them, so a_r is the larger of two rates,
each of which the replicas have kept up: that of the whole run, and that of its saturated seconds, those in which
more than 1 % of the requests got no good answer. With a deadline of D seconds the good answers to a stretch of S such
seconds were given within S + D seconds; at most as many of them as of the whole run's, others_r, did not need r:

    a_r = (good - others_r) / sum(S + D)

The headroom is what failures, deployments and an uneven spread may take. Requests in flight over all gateways follow
from Little's law, L = lambda * W: with W = p50 the usual number, with W = p99 the one to size limits for.

The figures are lower bounds of what one replica can do: only the role that was the bottleneck worked at its limit, so
the others come out too many, never too few. Drive the load run past its knee, or `a_r` is what was asked, not what is
possible.

Source: J. D. C. Little, "A Proof for the Queuing Formula L = lambda W", Operations Research 9 (1961).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from recsys.core import BadInput

# role -> tiers whose answers needed it
ROLE_TIERS: Mapping[str, tuple[str, ...]] = {
    "gateway": ("full", "rank", "retrieval", "cached", "popular"),
    "scoring": ("full", "rank", "retrieval"),
    "reranker": ("full",),
}
_GOOD_SHARE = 0.99  # below it a second was saturated, and a run past its knee
_RERUN = "Run `double11 load` against the deployment first, and give its report."


@dataclass(frozen=True, kw_only=True, slots=True)
class RolePlan:
    """One role. answers_per_s: good answers of one replica in the load run. replicas: needed at the peak."""

    replicas_measured: int
    answers_per_s: float
    replicas: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CapacityPlan:
    """The estimate. Rates per second; in_flight_*: requests in flight over all gateways at the peak (Little's law).

    caveats: what in the load run makes the estimate less sure; empty when nothing does.
    """

    peak_per_s: float
    headroom: float
    in_flight_p50: int
    in_flight_p99: int
    roles: Mapping[str, RolePlan]
    caveats: tuple[str, ...]


def capacity_plan(
    report: Mapping[str, Any], *, peak_per_s: float, replicas: Mapping[str, int], headroom: float = 0.3
) -> CapacityPlan:
    """Plan for every peak request to get tier full.

    report: report.json of `double11 load`. replicas: of each role while it ran; 1 where none is said, with a caveat.
    headroom: share of a replica kept free.
    Raises: BadInput for a report that lacks a figure, a rate or share out of range, or no good answers to scale from.
    """
    if not 0 < peak_per_s <= 1e9:
        raise BadInput("--peak-rate", came=peak_per_s, expected="above 0 requests per second", fix="Correct it.")
    if not 0 <= headroom <= 0.9:
        raise BadInput("--headroom", came=headroom, expected="0 to 0.9", fix="Leave e.g. 0.3 of each replica free.")
    requests, good = _number(report, "requests"), _number(report, "within_deadline")
    good_per_s = _number(report, "goodput_per_s")
    if not good:
        raise BadInput("load report", came="no answer within its deadline", expected="some", fix=_RERUN)
    answers = {tier: _number(found, "answers") for tier, found in dict(report.get("tiers", {})).items()}
    saturated_good, saturated_s = _saturated(report)
    roles = {}
    for role, tiers in ROLE_TIERS.items():
        measured = replicas.get(role, 1)
        if measured < 1:
            raise BadInput(
                f"--{role}-replicas", came=measured, expected="at least 1", fix="Count those of the load run."
            )
        needing, every = sum(answers.get(t, 0.0) for t in tiers), sum(answers.values())
        saturated_per_s = (saturated_good - (every - needing)) / saturated_s if saturated_s else 0.0
        each_per_s = max(good_per_s * needing / max(every, 1.0), saturated_per_s) / measured
        if each_per_s:
            needed = math.ceil(peak_per_s / ((1 - headroom) * each_per_s))
            roles[role] = RolePlan(replicas_measured=measured, answers_per_s=round(each_per_s, 3), replicas=needed)
    latency = report.get("latency_ms", {})
    return CapacityPlan(
        peak_per_s=peak_per_s,
        headroom=headroom,
        in_flight_p50=math.ceil(peak_per_s * _number(latency, "p50") / 1e3),
        in_flight_p99=math.ceil(peak_per_s * _number(latency, "p99") / 1e3),
        roles=roles,
        caveats=(*_caveats(report, answers, good / requests), *_assumed(roles.keys() - replicas.keys())),
    )


def _saturated(report: Mapping[str, Any]) -> tuple[float, float]:
    """Good answers to the requests of saturated seconds, and the seconds within which they were given."""
    good = within_s = 0.0
    last = -math.inf
    seconds = report.get("seconds")
    for row in seconds if isinstance(seconds, list) else ():
        at, requests, met = (_number(row, name) for name in ("second", "requests", "within_deadline"))
        if met < _GOOD_SHARE * requests:
            good += met
            within_s += 1 if at == last + 1 else 1 + _number(report, "deadline_ms") / 1e3
            last = at
    return good, within_s


def _caveats(report: Mapping[str, Any], answers: Mapping[str, float], good_share: float) -> tuple[str, ...]:
    found = []
    if good_share > _GOOD_SHARE:
        found.append("the load run was not past the knee: replicas could do more than was asked of them")
    missing = [role for role, tiers in ROLE_TIERS.items() if not any(answers.get(t) for t in tiers)]
    if missing:
        found.append(f"no answer needed {', '.join(missing)}: not planned")
    if _number(report.get("generator_lag_ms", {}), "p99") > _number(report, "deadline_ms") / 10:
        found.append("the generator lagged: this machine, not the server, may have been the limit")
    return tuple(found)


def _assumed(unsaid: Set[str]) -> tuple[str, ...]:
    if not unsaid:
        return ()
    options = " ".join(f"--{role}-replicas N" for role in ROLE_TIERS if role in unsaid)
    return (f"one replica each is taken to have done it, for want of {options}: N of them make N times the plan",)


def _number(of: Any, name: str) -> float:
    value = of.get(name) if isinstance(of, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadInput(f"load report, {name}", came=repr(value), expected="a number, 0 or more", fix=_RERUN)
    return float(value)
