"""`double11 plan capacity|autoscale|embeddings`: estimates before the day."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from recsys.cli.common import emit, json_option, parse_time_us
from recsys.core import BadInput, NotFound
from recsys.planning import CapacityPlan, RolePlan, Schedule, capacity_plan, manifests


@click.group()
def plan() -> None:
    """Estimate replicas, autoscaling and embedding placement."""


@plan.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--peak-rate", type=float, required=True, help="Requests per second to plan for.")
@click.option("--headroom", type=float, default=0.3, show_default=True, help="Share of each replica kept free.")
@click.option("--gateway-replicas", type=int, help="While the load ran; taken to be 1, with a caveat.")
@click.option("--scoring-replicas", type=int, help="While the load ran, of each shard; taken to be 1, with a caveat.")
@click.option("--reranker-replicas", type=int, help="While the load ran; taken to be 1, with a caveat.")
@json_option
def capacity(
    report: Path,
    peak_rate: float,
    headroom: float,
    gateway_replicas: int | None,
    scoring_replicas: int | None,
    reranker_replicas: int | None,
    as_json: bool,
) -> None:
    """Replicas per role for a peak, from REPORT, what `double11 load --out` wrote."""
    replicas = {"gateway": gateway_replicas, "scoring": scoring_replicas, "reranker": reranker_replicas}
    said = {role: number for role, number in replicas.items() if number is not None}
    found = capacity_plan(_read(report), peak_per_s=peak_rate, replicas=said, headroom=headroom)
    emit(asdict(found), as_json=as_json, text=lambda: _capacity_text(found))


@plan.command()
@click.argument("capacity_json", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--quiet-rate", type=float, required=True, help="Requests per second of a usual hour.")
@click.option("--peak-from", help="ISO time; with --peak-to, pods are there before it (KEDA).")
@click.option("--peak-to", help="ISO time.")
@click.option("--lead-minutes", type=click.IntRange(0, 1440), default=15, show_default=True)
@click.option(
    "--shards", type=click.IntRange(1, 64), default=1, show_default=True, help="Of the item index: scoring-0, -1, ..."
)
@click.option("--namespace", default="double11", show_default=True)
@json_option
def autoscale(
    capacity_json: Path,
    quiet_rate: float,
    peak_from: str | None,
    peak_to: str | None,
    lead_minutes: int,
    shards: int,
    namespace: str,
    as_json: bool,
) -> None:
    """Scalers as YAML from PLAN, what `double11 plan capacity --json` printed. For kubectl apply -f -."""
    import yaml

    if (peak_from is None) != (peak_to is None):
        raise BadInput("--peak-from, --peak-to", came="one of them", expected="both or neither", fix="Give the other.")
    schedule = None
    if peak_from and peak_to:
        lead = timedelta(minutes=lead_minutes)
        schedule = Schedule(start=_time(peak_from, "--peak-from"), end=_time(peak_to, "--peak-to"), lead=lead)
    found = manifests(
        _read_plan(capacity_json), quiet_per_s=quiet_rate, schedule=schedule, shards=shards, namespace=namespace
    )
    emit(found, as_json=as_json, text=lambda: yaml.safe_dump_all(found, sort_keys=False).rstrip())


@plan.command()
@click.argument("description", type=click.Path(path_type=Path))
@json_option
def embeddings(description: Path, as_json: bool) -> None:
    """Placement of embedding tables by TorchRec's planner; DESCRIPTION is JSON with topology, batch_size, tables."""
    from recsys.planning import embeddings as planner

    found = planner.plan(*planner.parse(_read(description)))
    emit(found, as_json=as_json, text=lambda: _embeddings_text(found))


def _embeddings_text(found: dict[str, Any]) -> str:
    lines = [f"estimate of the {found['estimate_of']}, not a measurement"]
    lines.append(f"{'table':<16}{'sharding':<20}{'kernel':<20}{'ranks':>7}")
    lines += [f"{t['table']:<16}{t['sharding']:<20}{t['kernel']:<20}{len(t['ranks']):>7}" for t in found["tables"]]
    memory = sorted(found["memory_gib_by_rank"].values())
    middle = memory[len(memory) // 2]
    lines.append(f"memory per rank, GiB: least {memory[0]}, median {middle}, most {memory[-1]}, all {sum(memory):.0f}")
    return "\n".join([*lines, f"step, ms: {found['step_ms_estimate']} on the slowest rank"])


def _read(path: Path) -> Any:
    if not path.is_file():
        raise NotFound(str(path), came="no such file", expected="a JSON file", fix="Correct the path.")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BadInput(str(path), came=str(error), expected="JSON", fix="Give the file the command wrote.") from error


def _read_plan(path: Path) -> CapacityPlan:
    document = _read(path)
    try:
        roles = {name: RolePlan(**role) for name, role in document["roles"].items()}
        return CapacityPlan(**{**document, "roles": roles, "caveats": tuple(document["caveats"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise BadInput(
            str(path), came=f"{error!r}", expected="a capacity plan", fix="double11 plan capacity REPORT --json > PLAN"
        ) from error


def _time(value: str, option: str) -> datetime:
    at_us = parse_time_us(value, option)
    assert at_us is not None
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at_us)


def _capacity_text(found: CapacityPlan) -> str:
    lines = [f"{'role':<10}{'replicas':>9}  {'good answers/s of one replica':>30}"]
    lines += [f"{name:<10}{role.replicas:>9}  {role.answers_per_s:>30g}" for name, role in found.roles.items()]
    lines.append(f"in flight at {found.peak_per_s:g}/s: {found.in_flight_p50} at p50, {found.in_flight_p99} at p99")
    return "\n".join([*lines, *(f"caveat: {c}" for c in found.caveats)])
