"""A gateway of its own on loopback, `double11 serve`, asked over the wire.

limit: the health check of the same server, an RPC that does nothing. Then an open loop at a constant rate: the share of
answers within the deadline and their p99.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from double11.v1 import recommend_pb2, recommend_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from recsys.bench.harness import Contest, Row, figure, measure
from recsys.core import Unavailable
from recsys.load import LoadPlan
from recsys.load import run as run_load

_DEADLINE_MS, _STOP_S_MAX = 200.0, 30.0


def bench(quick: bool, run: Path, store: str, users: Sequence[str]) -> tuple[dict[str, Any], list[Row]]:
    """Milliseconds per request one after another; goodput and p99 of the open loop.

    store: feature store and log URL with the users' events; its newest event is "now".
    Raises: Unavailable when the gateway does not start.
    """
    requests, repeats, rate_per_s, duration_s = (5, 2, 5.0, 1.0) if quick else (100, 5, 40.0, 20.0)
    with _gateway(run, store) as target, grpc.insecure_channel(target) as channel:
        recommendation = recommend_pb2_grpc.RecommendationServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)

        def recommend() -> float:
            for i in range(requests):
                asked = recommend_pb2.RecommendRequest(user_id=users[i % len(users)])
                recommendation.Recommend(asked, timeout=_DEADLINE_MS * 10 / 1e3)
            return requests

        def nothing() -> float:
            for _ in range(requests):
                health.Check(health_pb2.HealthCheckRequest(), timeout=_DEADLINE_MS / 1e3)
            return requests

        one = ("double11 Recommend", recommend)
        contest = Contest(what="one request after another", unit="ms", ours=one, limit=("health check", nothing))
        rows = measure([contest], repeats=repeats)
        plan = LoadPlan(
            target=target, shape="const", rate_per_s=rate_per_s, duration_s=duration_s, deadline_ms=_DEADLINE_MS
        )
        report = asyncio.run(run_load(plan, users))
    share = report["within_deadline"] / max(report["requests"], 1)
    rows.append(figure(f"answers within {_DEADLINE_MS:g} ms at {rate_per_s:g}/s", "share", share, limit=1.0))
    rows.append(figure(f"p99 at {rate_per_s:g}/s", "ms", float(report["latency_ms"]["p99"])))
    config = {"requests": requests, "repeats": repeats, "rate_per_s": rate_per_s, "duration_s": duration_s}
    return {**config, "tiers": {t: v["answers"] for t, v in report["tiers"].items()}}, rows


@contextmanager
def _gateway(run: Path, store: str) -> Iterator[str]:
    words = ["serve", "--run", str(run), "--store", store, "--clock", "data", "--listen", "127.0.0.1:0"]
    program = f"from recsys.cli.main import main; main({words!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # empty when the process ends
        if not line:
            raise Unavailable(
                "double11 serve", came=f"exit code {process.wait()}", expected="a gateway", fix="Read its log above."
            )
        yield f"127.0.0.1:{json.loads(line)['port']}"
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
