"""Sends a LoadPlan to a gateway and tallies the answers.

Every request leaves at its intended time whether or not earlier ones have come back. Latency counts from the intended
time, so a stalled generator or server cannot hide its waiting (coordinated omission). The generator's own lag is in
the report: a large one means that this machine, not the server, was the limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from double11.v1 import recommend_pb2 as pb

from recsys.core import BadInput, Double11Error, Tier
from recsys.core.hardware import commit, describe
from recsys.core.progress import bar
from recsys.load.arrivals import arrivals
from recsys.load.tally import Outcome, Tally
from recsys.serving import ClientConfig, RecommendClient

_IN_FLIGHT_MAX = 20_000  # beyond this a request is not sent but counted as GENERATOR_FULL


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What to send. rate_per_s: in quiet time; deadline_ms: from the intended send time; stress: mark the traffic."""

    target: str
    shape: str
    rate_per_s: float
    duration_s: float
    deadline_ms: float
    limit: int = 10
    seed: int = 0
    stress: bool = False


async def run(plan: LoadPlan, users: Sequence[str], config: ClientConfig | None = None) -> dict[str, Any]:
    """Send the plan for users drawn uniformly from `users`; returns the report. config: for its TLS, never throttled.

    Raises: BadInput for an empty user list or a plan out of range.
    """
    if not users:
        raise BadInput("--users", came="no user ids", expected="at least one", fix="Name a file with one id a line.")
    if not 0 < plan.deadline_ms <= 600_000:
        raise BadInput("--deadline-ms", came=plan.deadline_ms, expected="above 0, at most 600000", fix="Correct it.")
    rng = np.random.default_rng(plan.seed)
    intended_s = arrivals(plan.shape, plan.rate_per_s, plan.duration_s, rng)
    chosen = rng.integers(0, len(users), len(intended_s))
    tally = Tally(plan.deadline_ms, plan.duration_s)
    running: set[asyncio.Task[None]] = set()
    async with RecommendClient(plan.target, replace(config or ClientConfig(), throttle_ratio=0.0)) as client:
        start_s = time.monotonic()
        with bar(total=len(intended_s), what=f"load {plan.shape}", unit="req") as progress:
            for at_s, user in zip(intended_s, chosen, strict=True):
                if (wait_s := start_s + at_s - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                else:
                    await asyncio.sleep(0)  # late: still let answers in
                progress.update(1)
                if len(running) >= _IN_FLIGHT_MAX:
                    now_s = time.monotonic() - start_s
                    tally.add(Outcome(intended_s=at_s, sent_s=now_s, finished_s=now_s, status="GENERATOR_FULL"))
                    continue
                task = asyncio.create_task(_one(client, plan, users[user], at_s, start_s, tally))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)
    return {
        **asdict(plan),
        "users": len(users),
        **tally.report(plan.duration_s),
        "commit": commit(),
        "hardware": describe(),
    }


async def _one(
    client: RecommendClient, plan: LoadPlan, user_id: str, intended_s: float, start_s: float, tally: Tally
) -> None:
    sent_s = time.monotonic() - start_s
    left_ms = plan.deadline_ms - (sent_s - intended_s) * 1e3
    request = pb.RecommendRequest(user_id=user_id, limit=plan.limit, stress=plan.stress, surface="load")
    status, tier = "OK", ""
    fallbacks: tuple[str, ...] = ()
    try:
        response = await client.call(request, deadline_ms=max(left_ms, 0.0))
        tier, fallbacks = Tier(response.tier).label, tuple(response.fallbacks)
    except Double11Error as error:
        status = error.grpc_status
    tally.add(
        Outcome(
            intended_s=intended_s,
            sent_s=sent_s,
            finished_s=time.monotonic() - start_s,
            status=status,
            tier=tier,
            fallbacks=fallbacks,
        )
    )
