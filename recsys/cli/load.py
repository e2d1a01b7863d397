"""`double11 load` and `double11 stress`: open-loop load on a gateway, and the same marked as synthetic traffic."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from recsys.cli.common import config_option, emit, json_option, seed_option
from recsys.core import BadInput, NotFound
from recsys.core.config import Config
from recsys.load import SHAPES, LoadPlan, run
from recsys.serving.config import ClientConfig

_NEWCOMERS = 10_000


def _load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--target", required=True, help="HOST:PORT of the gateway."),
        click.option("--shape", type=click.Choice(list(SHAPES)), default="const", show_default=True),
        click.option("--rate", "rate_per_s", type=float, required=True, help="Requests per second in quiet time."),
        click.option("--duration", "duration_s", type=float, required=True, help="Seconds."),
        click.option("--deadline-ms", type=float, default=200.0, show_default=True),
        click.option("--limit", type=int, default=10, show_default=True, help="Items per slate."),
        click.option("--users", type=click.Path(path_type=Path), help="File, one user id a line (default: newcomers)."),
        seed_option,
        click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Report (JSON)."),
        config_option,
        json_option,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@_load_options
def load(users: Path | None, out: Path, config_path: Path | None, as_json: bool, **plan: Any) -> None:
    """Send open-loop load to a gateway and write a report."""
    _run(LoadPlan(**plan), users, out, config_path, as_json)


@click.command()
@_load_options
def stress(users: Path | None, out: Path, config_path: Path | None, as_json: bool, **plan: Any) -> None:
    """Full-link stress test: load whose every request carries the stress mark."""
    _run(LoadPlan(**plan, stress=True), users, out, config_path, as_json)


def _run(plan: LoadPlan, users: Path | None, out: Path, config_path: Path | None, as_json: bool) -> None:
    report = asyncio.run(run(plan, _users(users), Config.load(config_path).get(ClientConfig)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1), "utf-8")
    emit(report, as_json=as_json, text=lambda: _text(report, out))


def _users(path: Path | None) -> list[str]:
    if path is None:
        return [f"newcomer-{i}" for i in range(_NEWCOMERS)]
    if not path.is_file():
        raise NotFound("--users", came=str(path), expected="a text file, one user id a line", fix="Correct the path.")
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput("--users", came=str(error), expected="UTF-8 text", fix="Name a text file.") from error


def _text(report: dict[str, Any], out: Path) -> str:
    latency = report["latency_ms"]
    lines = [
        f"offered {report['offered_per_s']}/s, good within {report['deadline_ms']:g} ms {report['goodput_per_s']}/s",
        "statuses " + ", ".join(f"{k} {v}" for k, v in sorted(report["statuses"].items())),
        *(
            f"tier {tier}: {t['answers']} answers, p50 {t['latency_ms']['p50']} ms, p99 {t['latency_ms']['p99']} ms"
            for tier, t in report["tiers"].items()
        ),
        f"all answers p50 {latency['p50']} ms, p99 {latency['p99']} ms; "
        f"generator lag p99 {report['generator_lag_ms']['p99']} ms",
        str(out),
    ]
    return "\n".join(lines)
