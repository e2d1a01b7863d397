"""`double11 bench`: one subject, ours beside a peer and the machine's limit, measured in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recsys.cli.common import emit, json_option
from recsys.core.urls import default_url


@click.command()
@click.argument("name", type=click.Choice(["retrieval", "rerank", "features", "ingest", "train", "serve"]))
@click.option("--quick", is_flag=True, help="Small sizes: tries the benchmark, proves nothing.")
@click.option("--run", "run_path", type=click.Path(path_type=Path), help="serve, retrieval, rerank: run directory.")
@click.option("--store", help="serve: store URL (default embedded:$DOUBLE11_HOME or embedded:./.double11).")
@click.option("--users", type=click.Path(path_type=Path, exists=True), help="serve: a file with one user id a line.")
@click.option("--events", type=click.IntRange(1_000, 10_000_000), help="ingest: events (default 10 million).")
@json_option
def bench(
    name: str,
    quick: bool,
    run_path: Path | None,
    store: str | None,
    users: Path | None,
    events: int | None,
    as_json: bool,
) -> None:
    """Measure NAME: warm up, interleave with the peer, repeat; medians, spread, hardware, commit."""
    from recsys.bench import Deployment, run

    deployment = None
    if run_path and users:
        deployment = Deployment(run=run_path, store=store or default_url(), users=users.read_text("utf-8").split())
    found = run(name, quick=quick, deployment=deployment, events=events, run_path=run_path)
    emit(found, as_json=as_json, text=lambda: _text(found))


def _text(found: dict[str, Any]) -> str:
    machine = found["hardware"]
    lines = [f"{found['name']} at {found['commit']} on {machine['cpu']}, {machine['cores']} cores: {found['config']}"]
    for row in found["rows"]:
        lines.append(f"{row['what']} [{row['unit'].replace('per_s', '1/s')}]")
        spreads = [*row["spread"].values(), *[0.0] * len(row["median"])]
        lines += [
            f"    {value:>14,.3f}  ±{spread / 2:.0%}  {who}"
            for (who, value), spread in zip(row["median"].items(), spreads, strict=False)
        ]
        if row["ratio"] is not None:
            lines.append(f"    {row['ratio']:>14.2f}  times the peer")
    return "\n".join(lines)
