"""`double11 status` and `double11 peak show|activate|revert`: AdminService from the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
from double11.v1 import admin_pb2 as pb
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from recsys.cli.common import config_option, emit, json_option
from recsys.core import Tier
from recsys.core.config import Config
from recsys.serving.client import AdminClient
from recsys.serving.config import ClientConfig

target_option = click.option(
    "--target", default="127.0.0.1:50051", show_default=True, help="HOST:PORT of the gateway's AdminService."
)


@click.command()
@target_option
@config_option
@json_option
def status(target: str, config_path: Path | None, as_json: bool) -> None:
    """State, versions, load, tiers and parts of a gateway. Exit code 4 when it does not answer."""
    _call(target, config_path, AdminClient.status, _status_text, as_json)


@click.group()
def peak() -> None:
    """Prepared peak plans: limits and tiers that are put in force at once (预案)."""


@peak.command()
@target_option
@config_option
@json_option
def show(target: str, config_path: Path | None, as_json: bool) -> None:
    """The prepared plans and the one in force."""
    _call(target, config_path, AdminClient.peak, _peak_text, as_json)


@peak.command()
@click.argument("name")
@target_option
@config_option
@json_option
def activate(name: str, target: str, config_path: Path | None, as_json: bool) -> None:
    """Put a prepared plan in force."""
    _call(
        target, config_path, lambda client: client.activate(name), lambda r: f"in force: {_plan_text(r.plan)}", as_json
    )


@peak.command()
@target_option
@config_option
@json_option
def revert(target: str, config_path: Path | None, as_json: bool) -> None:
    """Back to the configured limits and tiers."""
    _call(
        target, config_path, AdminClient.revert, lambda r: f"reverted: {r.reverted or 'no plan was in force'}", as_json
    )


def _call(
    target: str,
    config_path: Path | None,
    method: Callable[[AdminClient], Awaitable[Any]],
    text: Callable[[Any], str],
    as_json: bool,
) -> None:
    config = Config.load(config_path).get(ClientConfig)

    async def called() -> Message:
        async with AdminClient(target, config) as client:
            response: Message = await method(client)
            return response

    response = asyncio.run(called())
    document = MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    emit(document, as_json=as_json, text=lambda: text(response))


def _status_text(response: pb.GetStatusResponse) -> str:
    tiers = ", ".join(f"{t} {n}" for t, n in sorted(response.responses_by_tier.items())) or "none yet"
    lines = [
        f"state     {response.state}, up {response.uptime_s:.0f} s",
        f"in flight {response.in_flight_requests} of {response.in_flight_limit}",
        f"responses {tiers}",
        f"peak plan {response.peak_plan or 'none'}",
        "versions  " + ", ".join(f"{part} {v}" for part, v in sorted(response.versions.items())),
    ]
    lines += [f"part      {p.name}: {p.state}{f' ({p.detail})' if p.detail else ''}" for p in response.parts]
    return "\n".join(lines)


def _peak_text(response: pb.GetPeakResponse) -> str:
    plans = [f"{'* ' if p.name == response.active else '  '}{_plan_text(p)}" for p in response.plans]
    return "\n".join([*(plans or ["no plans prepared"]), f"in force: {response.active or 'none'}"])


def _plan_text(plan: pb.PeakPlan) -> str:
    parts = [
        f"best tier {Tier(plan.tier_best).label}" if plan.tier_best else "",
        f"in-flight limit {plan.in_flight_limit}" if plan.in_flight_limit else "",
        f"rerank items {plan.rerank_items_max}" if plan.rerank_items_max else "",
    ]
    return f"{plan.name}: {', '.join(p for p in parts if p) or 'changes nothing'}"
