"""Which arm a gateway serves: what was asked, less what the run does not have, less what a peak plan takes away."""

from __future__ import annotations

from dataclasses import replace

from recsys.core import BadInput, RunDirectory, Tier, VersionMismatch, logging
from recsys.pipeline import ARMS, Arm
from recsys.serving.config import PeakPlan

_log = logging.get_logger(__name__)


def served_arm(name: str, run: RunDirectory, *, reranker: bool) -> Arm:
    """The named arm over this run. Without a reranker `full` becomes `rank`; without an index, `ann` is left out.

    Raises: BadInput for an unknown arm; VersionMismatch for an arm that ranks over a run without a ranker.
    """
    if name not in ARMS:
        raise BadInput("--arm", came=name, expected=f"one of {', '.join(ARMS)}", fix="Correct the name.")
    arm = ARMS[name]
    if arm.order == "rerank" and not (reranker and run.reranker_versions()):
        _log.warning("arm_without_reranker", arm=name, run=run.run_id, asked=reranker)
        arm = replace(arm, order="rank")
    if arm.order != "source" and not run.has("models/ranker.safetensors"):
        raise VersionMismatch(
            f"arm {name} over run {run.run_id}",
            came="a run without models/ranker.safetensors",
            expected="a run with a ranker",
            fix="Train the run whole, or serve it with --arm retrieval.",
        )
    if not run.has("index/ann.faiss") and any(f.source == "ann" for f in arm.feeds):
        _log.warning("source_left_out", source="ann", run=run.run_id, missing="index/ann.faiss")
        arm = replace(arm, feeds=tuple(f for f in arm.feeds if f.source != "ann"))
    return arm


def limited(arm: Arm, plan: PeakPlan) -> Arm:
    """The arm under a peak plan: never a better tier than the arm's own."""
    if plan.rerank_items_max is not None:
        arm = replace(arm, rerank_depth=plan.rerank_items_max)
    if plan.tier_best is None or plan.tier_best <= arm.tier:
        return arm
    if plan.tier_best is Tier.POPULAR:
        return ARMS["popular"]
    return replace(arm, order="rank" if plan.tier_best is Tier.RANK else "source")
