"""Several cuts and seeds, one report: what a claim about quality rests on.

For every cut and seed a run is trained on events before the cut and replayed until the next cut. The figures are pooled
over all cuts; a query counts once, with the mean of its seeds, and users are resampled whole. Runs and reports are kept
in the working folder by cut and seed, so that an interrupted comparison goes on where it was; what was made by another
commit, with other settings or for another question is made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from llm_reranker.config import DistillConfig
from recsys.core import BadInput, RunDirectory
from recsys.core.errors import CorruptData, NotFound, VersionMismatch
from recsys.core.hardware import commit, describe
from recsys.data import Dataset
from recsys.evaluation import MEASURES, bootstrap_mean_ci, holm, measures, paired_bootstrap, rare_only
from recsys.evaluation.queries import Task
from recsys.replay import compare
from recsys.replay.figures import HEADLINE, read_report
from recsys.training import Settings, train
from recsys.training.distilled import add_reranker

SIMPLE = ("popular", "own_history", "own_history_popular", "item_knn", "als", "bpr", "ease", "tifu_knn")
SEEDLESS = frozenset(("popular", "own_history", "own_history_popular", "item_knn", "ease", "tifu_knn"))
RECALL = "recall@100"
_DIGITS = 6
_Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rolling:
    """What is compared. cuts: ascending, microseconds UTC; each is replayed to the next one, the last to `to_us`.

    queries_max: of a cut, a sample that is the same for every seed; None = everybody.
    """

    cuts: tuple[int, ...]
    to_us: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    task: Task = "all"
    positives: tuple[str, ...] = ("purchase",)
    queries_max: int | None = None

    def __post_init__(self) -> None:
        ordered = [*self.cuts, self.to_us]
        if not self.cuts or not self.seeds or sorted(set(ordered)) != ordered:
            raise BadInput(
                "--cuts", came=", ".join(map(compare.iso, ordered)), expected="ascending times before --to, and a seed",
                fix="Write e.g. --cuts 2011-06-01,2011-07-01 --seeds 0,1,2.",
            )  # fmt: skip


def rolling(
    dataset_dir: Path | str,
    out: Path | str,
    what: Rolling,
    *,
    work: Path | str,
    settings: Settings | None = None,
    distil: DistillConfig | None = None,
) -> dict[str, Any]:
    """Train, distil where `full` is asked for, replay and pool; returns and writes OUT/report.json.

    work: where runs and single reports are kept.
    Raises: what training and replay raise.
    """
    compare.check_arms(what.arms)
    compare.check_out(Path(out))
    dataset, work = Dataset.open(dataset_dir), Path(work)
    settings, distil = settings or Settings(), distil or DistillConfig()
    parts = []
    for cut_us, to_us in zip(what.cuts, [*what.cuts[1:], what.to_us], strict=True):
        for seed in what.seeds:
            run = _run(dataset, cut_us, seed, settings, work)
            if "full" in what.arms and not _distilled(run, distil):
                add_reranker(dataset.root, run, seed=seed, config=distil)
                run = RunDirectory.open(run.root)
            arms = [arm for arm in what.arms if seed == what.seeds[0] or arm not in SEEDLESS]
            parts.append(_part(dataset, run, replace(what, arms=tuple(arms)), cut_us, to_us, seed, work))
    report = {
        "dataset": {"name": dataset.root.resolve().name, "source": dataset.info.get("source"), "hash": dataset.hash},
        "protocol": "frozen",
        "task": what.task,
        "cuts": [compare.iso(c) for c in what.cuts],
        "to": compare.iso(what.to_us),
        "seeds": list(what.seeds),
        "positives": list(what.positives),
        "queries_max": what.queries_max,
        **pool(pl.concat(measured for measured, _ in parts), what.arms),
        "rare_items": pool(pl.concat(rare for _, rare in parts), what.arms),
        "commit": commit(),
        "hardware": describe(),
    }
    with compare.writing(Path(out)) as folder:
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return report


def pool(measured: pl.DataFrame, arms: Sequence[str]) -> dict[str, Any]:
    """{"queries", "arms", "pairs"} of measured queries: arm, cut, seed, query_id, user_id and a column per measure.

    Every arm has its measures pooled, `by_cut`, and `seeds_sd`: the standard deviation over seeds of the pooled mean.
    Pairs: `full` and `rank` against every other arm by NDCG@10, `retrieval` against every simple one by Recall@100; p
    is Holm-corrected over all pairs.
    """
    if measured.is_empty():
        return {"queries": 0, "arms": {}, "pairs": {}}
    mean = measured.group_by("arm", "cut", "query_id", "user_id").agg(pl.col(list(MEASURES)).mean())
    by_arm = {arm: mean.filter(pl.col("arm") == arm).sort("query_id") for arm in arms}
    users = by_arm[arms[0]]["user_id"].to_list()
    table: dict[str, Any] = {}
    for arm, rows in by_arm.items():
        table[arm] = {m: _rounded(rows[m].mean()) for m in MEASURES}
        low, high = bootstrap_mean_ci(_values(rows, HEADLINE), 0, users=users)
        table[arm]["ci95"] = {HEADLINE: [_rounded(low), _rounded(high)]}
        cuts = rows.group_by("cut").agg(pl.col(list(MEASURES)).mean()).sort("cut")
        table[arm]["by_cut"] = {
            compare.iso(row["cut"]): {m: _rounded(row[m]) for m in MEASURES} for row in cuts.iter_rows(named=True)
        }
        seeds = measured.filter(pl.col("arm") == arm).group_by("seed").agg(pl.col(list(MEASURES)).mean())
        table[arm]["seeds_sd"] = {m: _rounded(seeds[m].std() or 0.0) for m in (HEADLINE, RECALL)}
    return {"queries": len(users), "arms": table, "pairs": _pairs(by_arm, arms, users)}


def _pairs(by_arm: Mapping[str, pl.DataFrame], arms: Sequence[str], users: list[str]) -> dict[str, Any]:
    wanted = [("full", arm, HEADLINE) for arm in arms if arm != "full"] if "full" in arms else []
    wanted += [("rank", arm, HEADLINE) for arm in arms if arm not in ("full", "rank")] if "rank" in arms else []
    if "retrieval" in arms:
        wanted += [("retrieval", arm, RECALL) for arm in arms if arm in SIMPLE]
    tests = [
        paired_bootstrap(_values(by_arm[a], measure), _values(by_arm[b], measure), 0, users=users)
        for a, b, measure in wanted
    ]
    pairs: dict[str, Any] = {}
    for (a, b, measure), test, p in zip(wanted, tests, holm([t.p for t in tests]), strict=True):
        base = float(by_arm[b][measure].mean())  # type: ignore[arg-type]
        pairs.setdefault(f"{a}-{b}", {})[measure] = {
            "diff": _rounded(test.diff),
            "ratio": _rounded(1 + test.diff / base) if base else None,
            "ci95": [_rounded(bound) for bound in test.ci95],
            "p": _rounded(p),
        }
    return pairs


def _run(dataset: Dataset, cut_us: int, seed: int, settings: Settings, work: Path) -> RunDirectory:
    """The run of one cut and seed; one of this commit and these settings that is there is used again."""
    root = work / f"run-{cut_us}-{seed}"
    try:
        run = RunDirectory.open(root)
    except (NotFound, CorruptData, VersionMismatch):
        return train(dataset.root, root, until_us=cut_us, seed=seed, settings=settings, replace=True)
    facts = (run.manifest["commit"], run.manifest["dataset_hash"], run.manifest["config"])
    if facts == (commit(), dataset.hash, settings.as_dict()):
        return run
    return train(dataset.root, root, until_us=cut_us, seed=seed, settings=settings, replace=True)


def _distilled(run: RunDirectory, config: DistillConfig) -> bool:
    """True when the run's serving reranker was distilled with these settings."""
    versions = run.reranker_versions()
    if not versions:
        return False
    card = json.loads(run.path(f"reranker/{versions[-1]}/double11.json").read_text("utf-8"))
    return bool(card["report"].get("config") == asdict(config))


def _part(
    dataset: Dataset, run: RunDirectory, what: Rolling, cut_us: int, to_us: int, seed: int, work: Path
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Measures of every query of every arm at one cut and seed, and of rare items alone.

    A report of this run that is there is used again.
    """
    folder = work / f"report-{what.task}-{cut_us}-{seed}"
    if not _answers(folder, run, what, to_us):
        compare.replay(
            dataset.root, run, folder, arms=what.arms, task=what.task, from_us=cut_us, to_us=to_us,
            positives=what.positives, k=compare.K, queries_max=what.queries_max, queries_seed=what.seeds[0], seed=seed,
        )  # fmt: skip
    slates, queries = (pl.read_parquet(folder / f"{name}.parquet") for name in ("slates", "queries"))
    facts = {"cut": pl.lit(cut_us, pl.Int64), "seed": pl.lit(seed, pl.Int64)}

    def measured(asked: pl.DataFrame) -> pl.DataFrame:
        found = ((arm, measures(slates.filter(pl.col("arm") == arm), asked)) for arm in what.arms)
        return pl.concat(m.with_columns(asked["user_id"], arm=pl.lit(arm), **facts) for arm, m in found)

    return measured(queries), measured(rare_only(queries))


def _answers(folder: Path, run: RunDirectory, what: Rolling, to_us: int) -> bool:
    """True when the folder's report is of this run, reranker, commit and question, with every arm."""
    try:
        report = read_report(folder)
    except (NotFound, CorruptData):
        return False
    wanted = {
        "run": run.run_id,
        "reranker": compare.reranker_of(run),
        "commit": commit(),
        "to": compare.iso(to_us),
        "task": what.task,
        "positives": list(what.positives),
        "queries_max": what.queries_max,
        "queries_seed": None if what.queries_max is None else what.seeds[0],
        "k": compare.K,
    }
    return wanted.items() <= report.items() and set(what.arms) <= set(report["arms"])


def _values(rows: pl.DataFrame, measure: str) -> _Values:
    values: _Values = rows[measure].to_numpy()
    return values


def _rounded(value: Any) -> float:
    return round(float(value), _DIGITS)
