"""What each part of the student is worth: students that differ in one thing, same labels and lists. Heavy: torch.

Shape legend: n rows of one list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

from llm_reranker import fit, quality
from llm_reranker.config import DistillConfig
from llm_reranker.splits import Held
from llm_reranker.trainable import TrainableReranker


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One student. changes: to the configuration; text, embedding: False hides every text, every tower's vector.

    labels: False trains on what shoppers did alone.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    text: bool = True
    embedding: bool = True
    labels: bool = True


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "dense": Variant(changes={"num_experts": 0, "upcycle_epochs": 0}),
        "upcycled": Variant(changes={"upcycle_epochs": 1, "student_epochs": 1}),
        "without text": Variant(text=False),
        "without collaborative tokens": Variant(embedding=False),
        "without teacher": Variant(labels=False),
        "1 token": Variant(changes={"soft_tokens": 1}),
        "2 tokens": Variant(changes={"soft_tokens": 2}),
        "4 tokens": Variant(changes={"soft_tokens": 4}),
    }
)


class Student(Protocol):
    """A trained student and its raw log-odds of the validation lists, by task."""

    @property
    def network(self) -> TrainableReranker:
        """Teacher-forced, as trained."""
        ...

    @property
    def raw(self) -> Mapping[str, list[fit.Scores]]:
        """Per task, per list, float32 [n]."""
        ...


class Work(Protocol):
    """What the ablation needs of a distillation."""

    config: DistillConfig
    held: Mapping[str, Held]
    seed: int

    def student(self, variant: Variant, train: Sequence[fit.Chosen], seed: int) -> Student:
        """Train one."""
        ...


def rows(
    work: Work, train: Sequence[fit.Chosen], student: Student, judged: Mapping[str, list[fit.Scores]]
) -> list[dict[str, Any]]:
    """One row per order of the validation lists: the ranker's, the teacher's, the student's and every variant's.

    A row has, by task, NDCG@10 of the order itself, the weight that validation gives it beside the ranker's, NDCG@10
    of the blend, and its gain over the ranker's order with a 95 % interval. What cannot be upcycled has no such row.
    """
    rank = {task: of.rank for task, of in work.held.items()}
    found = [_row("rank", work, rank), _row("teacher", work, judged), _row("student", work, student.raw, student)]
    for name, variant in VARIANTS.items():
        if variant.changes.get("upcycle_epochs") and not work.config.can_upcycle:
            continue  # there are no such experts
        if all(getattr(work.config, k) == v for k, v in variant.changes.items()) and variant.changes:
            found.append({**found[2], "what": name})  # it is the student
            continue
        given = train if variant.labels else [replace(c, teacher=None) for c in train]
        other = work.student(variant, given, work.seed + 1)
        found.append(_row(name, work, other.raw, other))
    return found


def _row(
    what: str, work: Work, scores: Mapping[str, list[fit.Scores]], student: Student | None = None
) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what}
    if student is not None:
        row["parameters"] = sum(p.numel() for p in student.network.parameters())
    for task, of in work.held.items():
        if not of.chosen:
            continue
        mine = scores[task]
        weight = of.weight(mine, work.seed)
        blended = of.blended(mine, weight)
        own = quality.gain(mine, of.rank, of.label, work.seed)
        row[task] = {
            "ndcg@10": quality.mean_ndcg(mine, of.label),
            "over_rank": [round(x, 5) for x in (own.diff, *own.ci95)],
            "weight": weight,
            "blended": quality.mean_ndcg(blended, of.label),
        }
    return row
