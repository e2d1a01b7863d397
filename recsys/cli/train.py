"""`double11 train` and `promote`: make a run, choose the one that serves."""

from __future__ import annotations

from pathlib import Path

import click

from recsys.cli.common import config_option, emit, json_option, parse_time_us, seed_option
from recsys.core import RunDirectory


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new run directory.")
@click.option("--until", help="ISO time; nothing at or after it is seen (default: after the last event).")
@click.option(
    "--nproc",
    default=1,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Processes on this host.",
)
@seed_option
@click.option("--window-days", type=float, help="Length of a stacked window (default: a tenth of the data's span).")
@click.option("--threads", type=int, help="Threads of torch; the same number repeats a run bit by bit.")
@click.option("--replace", is_flag=True, help="Replace the run that is there, or behind a link.")
@config_option
@json_option
def train(
    directory: Path,
    out: Path,
    until: str | None,
    nproc: int,
    seed: int,
    window_days: float | None,
    threads: int | None,
    replace: bool,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Train towers, indexes and ranker on the dataset directory DIRECTORY by the stacked rule."""
    from recsys import training
    from recsys.core.config import Config

    flags = {"training.window_days": window_days, "training.threads": threads}
    settings = training.Settings.of(Config.load(config_path, flags))
    until_us = parse_time_us(until, "--until")
    run = training.train(directory, out, until_us=until_us, seed=seed, settings=settings, replace=replace, nproc=nproc)
    measures = run.manifest["measures"]
    document = {"run": str(run.root), "run_id": run.run_id, "until": run.until_us, "measures": measures}
    emit(document, as_json=as_json, text=lambda: _text(run))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def promote(run: Path, as_json: bool) -> None:
    """Make RUN the one that `serve` uses when no --run is given."""
    from recsys.training.promote import promote as promote_run

    link = promote_run(run)
    emit({"run": str(run), "current": str(link)}, as_json=as_json, text=lambda: f"{link} -> {link.resolve()}")


@click.command("train-online")
@click.option("--run", "run_path", required=True, type=click.Path(path_type=Path), help="The run that is served.")
@click.option("--log", required=True, help="Log URL: samples are read there, deltas published.")
@click.option("--store", help="Feature store URL, for users' histories (default: as --log, if embedded).")
@click.option("--state", type=click.Path(path_type=Path), help="Folder of the trainer's commits (default RUN.online).")
@click.option("--until-caught-up", is_flag=True, help="Stop when the samples there are at the start are trained.")
@config_option
@json_option
def train_online(
    run_path: Path,
    log: str,
    store: str | None,
    state: Path | None,
    until_caught_up: bool,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Train RUN's towers on from the samples on the log, and publish what changes as deltas.

    Prints one JSON line {"ready": true, "run_id", "sequence"} on stdout once it trains.
    """
    from recsys.core.config import Config
    from recsys.core.urls import default_url
    from recsys.training.online import train_online as train

    url = store or (log if log.startswith("embedded:") else default_url())
    state = state or run_path.resolve().with_name(run_path.resolve().name + ".online")
    done = train(run_path, log, url, state, Config.load(config_path), until_caught_up=until_caught_up)
    emit(done, as_json=as_json, text=lambda: f"{done['deltas']} deltas, the last is {done['sequence']}")


def _text(run: RunDirectory) -> str:
    judged = run.manifest["measures"]["validation"]
    lines = [f"run {run.run_id} in {run.root}, {len(run.manifest['files'])} files"]
    lines += [f"  validation {name} {value:.4f}" for name, value in judged.items()]
    return "\n".join(lines)
