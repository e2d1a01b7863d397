"""A run gets its reranker: candidate lists from its windows, a teacher's labels, a student, a new version."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from llm_reranker.config import DistillConfig, RerankConfig, TeacherConfig
from recsys.core.items import ItemTable
from recsys.core.run_dir import RunDirectory


def add_reranker(
    dataset_dir: Path | str,
    run: RunDirectory,
    *,
    seed: int = 0,
    config: DistillConfig | None = None,
    teacher: str = "qwen3-moe",
    teacher_config: TeacherConfig | None = None,
    lists: Path | None = None,
    labels: Path | None = None,
    ablate: bool = False,
    checkpoint: Path | None = None,
    serving: RerankConfig | None = None,
) -> dict[str, Any]:
    """Distil, add reranker/VERSION/ to the run, and return the report. The newest version serves.

    lists: Parquet lists (llm_reranker.lists.SCHEMA); None = made from the run's windows. labels: where label files are
    kept; None = RUN.work/labels. checkpoint: a Qwen3 folder that is taken as it is, nothing is distilled; serving: how
    much of a history it reads.
    Raises: what making lists and distilling raise; BadInput for lists from the run's `until` or later.
    """
    from llm_reranker import distill as distillation  # heavy
    from llm_reranker.adopt import adopt
    from recsys.models.tower import Tower
    from recsys.training import rerank_lists

    versions = run.reranker_versions()
    version = str(1 + max((int(v) for v in versions if v.isdigit()), default=0))
    lists, items = lists or rerank_lists.make(dataset_dir, run), ItemTable.read(run.path("items.parquet"))
    with tempfile.TemporaryDirectory(prefix="double11-distill-") as work:
        out = Path(work) / version
        report: dict[str, Any]
        if checkpoint is not None:
            report = adopt(
                checkpoint, lists, items, out, seed=seed, config=config, serving=serving, version=version,
                until_us=run.until_us,
            )  # fmt: skip
        else:
            report = distillation.distill(
                lists,
                items,
                out,
                seed=seed,
                config=config,
                teacher=teacher,
                teacher_config=teacher_config,
                labels=labels or run.work / "labels",
                item_vectors=Tower.load(run).item_vectors() if run.has("models/tower.json") else None,
                version=version,
                ablate=ablate,
                until_us=run.until_us,
            )
        run.add_files(out, f"reranker/{version}", {"rerankers": [*versions, version]})
    return report
