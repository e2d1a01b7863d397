"""Every quality figure of report.json, computed from the slates and queries alone, so that anyone can do it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recsys.core.errors import CorruptData, NotFound
from recsys.evaluation import MEASURES, bootstrap_mean_ci, coverage, holm, measures, paired_bootstrap, rare_only

HEADLINE = "ndcg@10"  # the measure with intervals and paired tests
_DIGITS = 6
_OF_ANY = {"arms", "protocol", "task"}


def compute(slates: pl.DataFrame, queries: pl.DataFrame, arms: Sequence[str], *, num_items: int, seed: int) -> Any:
    """{"queries", "arms", "pairs", "rare_items"} of report.json, without latency and fallbacks.

    slates: [arm, query_id, rank, item_id]. num_items: size of the catalogue before the cut. Pairs compare the
    reference arm (`full` where it ran, else the last one) with each other arm, by user; p is Holm-corrected over them.
    `rare_items` has the same three of the queries `rare_only`, without coverage.
    """
    computed = _compute(slates, queries, arms, seed=seed)
    for arm in arms:
        found = coverage(slates.filter(pl.col("arm") == arm), num_items)
        computed["arms"][arm]["coverage@10"] = round(found, _DIGITS)
    return {**computed, "rare_items": _compute(slates, rare_only(queries), arms, seed=seed)}


def _compute(slates: pl.DataFrame, queries: pl.DataFrame, arms: Sequence[str], *, seed: int) -> dict[str, Any]:
    if queries.is_empty():
        return {"queries": 0, "arms": {}, "pairs": {}}
    users = queries["user_id"].to_list()
    per_query: dict[str, Any] = {}
    table: dict[str, Any] = {}
    for arm in arms:
        mine = slates.filter(pl.col("arm") == arm)
        found = measures(mine, queries)
        per_query[arm] = found[HEADLINE].to_numpy()
        table[arm] = {name: round(float(found[name].mean()), _DIGITS) for name in MEASURES}  # type: ignore[arg-type]
        low, high = bootstrap_mean_ci(per_query[arm], seed, users=users)
        table[arm]["ci95"] = {HEADLINE: [round(low, _DIGITS), round(high, _DIGITS)]}
    reference = reference_arm(arms)
    others = [arm for arm in arms if arm != reference]
    tests = [paired_bootstrap(per_query[reference], per_query[arm], seed, users=users) for arm in others]
    pairs = {
        f"{reference}-{arm}": {
            HEADLINE: {
                "diff": round(test.diff, _DIGITS),
                "ci95": [round(bound, _DIGITS) for bound in test.ci95],
                "p": round(float(p), _DIGITS),
            }
        }
        for arm, test, p in zip(others, tests, holm([t.p for t in tests]), strict=True)
    }
    return {"queries": len(queries), "arms": table, "pairs": pairs}


def reference_arm(arms: Sequence[str]) -> str:
    """The arm the others are compared with, and the one a gate means when it names none."""
    return "full" if "full" in arms else arms[-1]


def recompute(report: Path) -> Any:
    """The figures of a report directory once more, from its slates.parquet and queries.parquet.

    Equal to the same keys of report.json (latency and fallbacks, which slates do not tell, are left out).
    Raises: NotFound, CorruptData.
    """
    document = read_report(report)
    folder = report if report.is_dir() else report.parent
    return compute(
        pl.read_parquet(folder / "slates.parquet"),
        pl.read_parquet(folder / "queries.parquet"),
        list(document["arms"]),
        num_items=document["catalogue_items"],
        seed=document["seed"],
    )


def is_report(folder: Path) -> bool:
    """True when the folder's report.json is one of ours, of a replay or a rolling one."""
    try:
        document = json.loads((folder / "report.json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(document, dict) and document.keys() >= _OF_ANY


def read_report(report: Path) -> Any:
    """report.json of a report directory (or the file itself) as a dict.

    Raises: NotFound when it is not there; CorruptData when it is not a replay's report.
    """
    path = report / "report.json" if report.is_dir() else report
    fix = "Make one: double11 replay DIR --run RUN --out REPORT"
    if not path.is_file():
        raise NotFound(f"report {report}", came="no report.json", expected="a replay's report", fix=fix)
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CorruptData(str(path), came=str(error), expected="JSON", fix=fix) from error
    if not isinstance(document, dict) or not {*_OF_ANY, "seed"} <= document.keys():
        raise CorruptData(str(path), came="no arms, protocol, seed or task", expected="a replay's report", fix=fix)
    return document
