"""`double11 distill`: candidate lists, teacher, student, and a new reranker version inside the run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from recsys.cli.common import config_option, emit, json_option, seed_option
from recsys.core.config import Config
from recsys.core.errors import BadInput, Conflict
from recsys.core.run_dir import RunDirectory


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--run", "run_path", type=click.Path(path_type=Path), required=True, help="Run directory to add to.")
@click.option("--teacher", default="qwen3-moe", show_default=True, help="Who labels: also hf:FOLDER or openai:MODEL.")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="Where label files are kept (default: RUN.work/labels)."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Take this Qwen3 folder as it is; distil nothing.")
@click.option("--ablate", is_flag=True, help="Train the students of the ablation too, for the report.")
@click.option("--lists", "lists_path", type=click.Path(path_type=Path), help="Parquet lists to use, not made anew.")
@click.option("--replace", is_flag=True, help="Add a newer version to a run that has a reranker; it then serves.")
@seed_option
@config_option
@json_option
def distill(
    dataset: Path,
    run_path: Path,
    teacher: str,
    labels: Path | None,
    checkpoint: Path | None,
    ablate: bool,
    lists_path: Path | None,
    replace: bool,
    seed: int,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Distil an LLM reranker for RUN from DATASET's events before the run's `until`.

    Writes reranker/VERSION/ into the run (Hugging Face layout) and makes it the serving version.
    """
    from llm_reranker.config import DistillConfig, RerankConfig, TeacherConfig
    from recsys.training.distilled import add_reranker

    run = RunDirectory.open(run_path)
    if (versions := run.reranker_versions()) and not replace:
        raise Conflict(
            f"run {run.run_id}, reranker", came=f"versions {versions}", expected="none",
            fix="Pass --replace to add a version that then serves.",
        )  # fmt: skip
    if lists_path is None and not dataset.is_dir():
        raise BadInput("DATASET", came=str(dataset), expected="a dataset directory", fix="See: double11 data import.")
    config = Config.load(config_path)
    with _unwinding_on_sigterm():
        report = add_reranker(
            dataset,
            run,
            seed=seed,
            config=config.get(DistillConfig),
            teacher=teacher,
            teacher_config=config.get(TeacherConfig),
            lists=lists_path,
            labels=labels,
            ablate=ablate,
            checkpoint=checkpoint,
            serving=config.get(RerankConfig),
        )
    emit({"run": str(run_path), **report}, as_json=as_json, text=lambda: _text(report))


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """SIGTERM ends what is under way as Ctrl-C does: labels that were paid for are written, work folders go."""
    ended = False

    def end(_: int, frame: FrameType | None) -> None:
        nonlocal ended
        ended = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end the writing
        interrupt = signal.getsignal(signal.SIGINT)  # asyncio's, where it runs; none in a script's background
        (interrupt if callable(interrupt) else signal.default_int_handler)(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (KeyboardInterrupt, RuntimeError):  # the latter from an event loop that was just about to stop
        if not ended:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _text(report: dict[str, Any]) -> str:
    active = report["active_parameters"]
    lines = [f"reranker {report['version']}: {report['seconds']['total']:.0f} s"]
    if "teacher" in report:
        lines.append(
            f"{report['queries']['train']} lists, teacher {report['teacher']['name']}; active parameters: "
            f"student {active['student']:,}, teacher {active['teacher']:,}"
        )
        if unusable := report["teacher"].get("unusable_answers"):
            requests = report["teacher"]["requests"] + report["teacher"]["refused"]
            lines.append(f"{unusable} of {requests} answers of the teacher were of no use")
    for task, said in report["tasks"].items():
        ndcg = ", ".join(f"{name} {value:.4f}" for name, value in said["ndcg@10"].items())
        lines.append(f"{task}: {said['queries']} validation lists, NDCG@10 {ndcg}")
        if gain := said.get("teacher_gain"):
            (low, high), beats = gain["ci95"], "beats" if gain["sure"] else "does not surely beat"
            beside = f" beside the ranker (weight {said['teacher_weight']})" if 0 < said["teacher_weight"] < 1 else ""
            lines.append(
                f"{task}: the teacher{beside} {beats} the ranker ({gain['diff']:+.4f}, {low:+.4f} to {high:+.4f})"
                + ("" if gain["sure"] else ": the student learns from what shoppers did alone")
            )
        lines.append(
            f"{task}: blend weight {said['weight']}"
            + ("" if said["weight"] else f": {_why(said)}, the ranker's order stands")
        )
    if not any(said["weight"] for said in report["tasks"].values()):
        lines.append("no say in any task: double11 serve --no-reranker gives the same slates for less")
    return "\n".join(lines + [_ablated(row) for row in report.get("ablation", [])])


def _ablated(row: dict[str, Any]) -> str:
    parts = [f"{t} {row[t]['ndcg@10']:.4f}, blended {row[t]['blended']:.4f}" for t in ("all", "new-only") if t in row]
    return f"{row['what']:<30}{'; '.join(parts)}"


def _why(said: dict[str, Any]) -> str:
    return "no sure gain" if said["queries"] else "no validation lists of this task"
