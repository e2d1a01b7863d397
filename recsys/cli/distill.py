"""`double11 distill`: candidate lists, teacher, student, and a new reranker version inside the run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from recsys.cli.common import config_option, emit, json_option
from recsys.core.config import Config
from recsys.core.errors import BadInput, Conflict
from recsys.core.items import ItemTable
from recsys.core.run_dir import RunDirectory


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--run", "run_path", type=click.Path(path_type=Path), required=True, help="Run directory to add to.")
@click.option("--teacher", default="qwen3-moe", show_default=True, help="Who labels: also hf:FOLDER or openai:MODEL.")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="Where label files are kept (default: RUN.work/labels)."
)
@click.option("--ablate", is_flag=True, help="Train the students of the ablation too, for the report.")
@click.option("--lists", "lists_path", type=click.Path(path_type=Path), help="Parquet lists to use, not made anew.")
@click.option("--replace", is_flag=True, help="Add a newer version to a run that has a reranker; it then serves.")
@click.option("--seed", type=int, default=0, show_default=True)
@config_option
@json_option
def distill(
    dataset: Path,
    run_path: Path,
    teacher: str,
    labels: Path | None,
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
    from llm_reranker import distill as distillation  # heavy
    from llm_reranker.config import DistillConfig, TeacherConfig
    from recsys.models.tower import Tower
    from recsys.training import rerank_lists

    run = RunDirectory.open(run_path)
    versions = run.reranker_versions()
    if versions and not replace:
        raise Conflict(
            f"run {run.run_id}, reranker", came=f"versions {versions}", expected="none",
            fix="Pass --replace to add a version that then serves.",
        )  # fmt: skip
    if lists_path is None and not dataset.is_dir():
        raise BadInput("DATASET", came=str(dataset), expected="a dataset directory", fix="See: double11 data import.")
    config = Config.load(config_path)
    version = str(1 + max((int(v) for v in versions if v.isdigit()), default=0))
    with tempfile.TemporaryDirectory(prefix="double11-distill-") as work:
        report: dict[str, Any] = distillation.distill(
            lists_path or rerank_lists.make(dataset, run),
            ItemTable.read(run.path("items.parquet")),
            Path(work) / version,
            seed=seed,
            config=config.get(DistillConfig),
            teacher=teacher,
            teacher_config=config.get(TeacherConfig),
            labels=labels or run.root.with_name(f"{run.root.name}.work") / "labels",
            ablate=ablate,
            item_vectors=Tower.load(run).item_vectors() if run.has("models/tower.json") else None,
            version=version,
        )
        run.add_files(Path(work) / version, f"reranker/{version}", {"rerankers": [*versions, version]})
    emit({"run": str(run_path), **report}, as_json=as_json, text=lambda: _text(report))


def _text(report: dict[str, Any]) -> str:
    active = report["active_parameters"]
    lines = [
        f"reranker {report['version']}: {report['queries']['train']} lists, {report['seconds']['total']:.0f} s",
        f"teacher {report['teacher']['name']}; active parameters: student {active['student']:,}, "
        f"teacher {active['teacher']:,}",
    ]
    for task, said in report["tasks"].items():
        ndcg = ", ".join(f"{name} {value:.4f}" for name, value in said["ndcg@10"].items())
        low, high = said["teacher_gain"]["ci95"]
        beats = "beats" if said["teacher_gain"]["sure"] else "does not surely beat"
        lines += [
            f"{task}: {said['queries']} validation lists, NDCG@10 {ndcg}",
            f"{task}: the teacher {beats} the ranker ({said['teacher_gain']['diff']:+.4f}, {low:+.4f} to {high:+.4f})"
            + ("" if said["teacher_gain"]["sure"] else ": the student learns from what shoppers did alone"),
            f"{task}: blend weight {said['weight']}"
            + (": the reranker adds nothing here, the ranker's order stands" if said["weight"] == 0 else ""),
        ]
    return "\n".join(lines + [_ablated(row) for row in report.get("ablation", [])])


def _ablated(row: dict[str, Any]) -> str:
    parts = [f"{t} {row[t]['ndcg@10']:.4f}, blended {row[t]['blended']:.4f}" for t in ("all", "new-only") if t in row]
    return f"{row['what']:<30}{'; '.join(parts)}"
