"""`--fail-if`: a report, or its change against a base report, decides the exit code.

    [ARM:]MEASURE OP NUMBER[%]      OP is <, <=, > or >=

Without % NUMBER is a value of this report; with % it is the change against the base, in percent of the base's value.
MEASURE is a key of an arm in report.json, `latency_ms.p99` included. Without ARM the reference arm is meant (`full`
where it ran). Examples: "ndcg@10<-2%", "recall@100<0.9", "rank:latency_ms.p99>20%".
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recsys.core.errors import BadInput, GateNotMet, VersionMismatch
from recsys.replay.figures import reference_arm

_GRAMMAR = re.compile(r"\s*(?:([\w-]+):)?([a-z_0-9@.]+)\s*(<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)(%?)\s*", re.ASCII)
_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_SAME = ("protocol", "task", "from", "to", "positives", "queries", "queries_max", "queries_seed", "k")


def check_gates(report: Mapping[str, Any], base: Mapping[str, Any] | None, expressions: Sequence[str]) -> None:
    """Evaluate every expression; the run of the command fails if one is true.

    Raises: GateNotMet naming each that is; BadInput for one that cannot be read, or names what the report does not
    have, or needs a base that is not given; VersionMismatch when the base answers other questions.
    """
    if base is not None:
        _check_comparable(report, base)
    met = [said for text in expressions if (said := _evaluate(text, report, base))]
    if met:
        raise GateNotMet(
            "replay --fail-if", came="; ".join(met), expected=f"none of: {', '.join(expressions)}",
            fix="Do not ship this run, or argue the trade and change the gate.",
        )  # fmt: skip


def check_grammar(expressions: Sequence[str], *, based: bool = True) -> None:
    """Raise BadInput for an expression that cannot be read, or needs a base where none is, before any work is done."""
    for text in expressions:
        relative = _parse(text)[-1]
        if relative and not based:
            raise _no_base(text)


def _parse(text: str) -> tuple[str | None, str, str, float, bool]:
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise BadInput(
            "--fail-if", came=text, expected="[ARM:]MEASURE OP NUMBER[%]", fix='Write e.g. --fail-if "ndcg@10<-2%".'
        )
    arm, measure, symbol, number, percent = match.groups()
    return arm, measure, symbol, float(number), bool(percent)


def _no_base(text: str) -> BadInput:
    fix = "Add --compare BASE, or name a value without %."
    return BadInput("--fail-if", came=text, expected="a base to change from", fix=fix)


def _evaluate(text: str, report: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    arm, measure, symbol, limit, relative = _parse(text)
    arm = arm or reference_arm(list(report["arms"]))
    value = _value(report, arm, measure, "this report")
    if not relative:
        return f"{arm} {measure} is {value:.4f}" if _OPERATORS[symbol](value, limit) else ""
    if base is None:
        raise _no_base(text)
    before = _value(base, arm, measure, "the base report")
    change = (value - before) / before * 100 if before else (0.0 if value == before else float("inf"))
    if not _OPERATORS[symbol](change, limit):
        return ""
    return f"{arm} {measure} went from {before:.4f} to {value:.4f} ({change:+.2f} %)"


def _value(report: Mapping[str, Any], arm: str, measure: str, where: str) -> float:
    at: Any = report["arms"].get(arm)
    if at is None:
        raise BadInput(
            "--fail-if", came=f"arm {arm}", expected=f"one of {list(report['arms'])} of {where}", fix="Name it."
        )
    known = sorted(name for name, value in at.items() if isinstance(value, int | float))
    for part in measure.split(".") if measure not in at else [measure]:
        at = at.get(part) if isinstance(at, Mapping) else None
    if not isinstance(at, int | float):
        raise BadInput("--fail-if", came=measure, expected=f"one of {known}", fix=f"Use a measure of {where}.")
    return float(at)


def _check_comparable(report: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    differ = [name for name in _SAME if report.get(name) != base.get(name)]
    if report["dataset"]["hash"] != base["dataset"]["hash"]:
        differ.append("dataset")
    if differ:
        raise VersionMismatch(
            "--compare",
            came=", ".join(f"{name} {base.get(name)}" for name in differ),
            expected=", ".join(f"{name} {report.get(name)}" for name in differ),
            fix="Replay the base with the same dataset, protocol, task, period, positives, sample of queries and k.",
        )
