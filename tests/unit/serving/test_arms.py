"""What a gateway serves: the arm asked for, less what the run lacks, less what a peak plan takes away."""

import pytest

from recsys.core import BadInput, RunDirectory, RunWriter, Tier, VersionMismatch
from recsys.pipeline import ARMS
from recsys.serving.arms import limited, served_arm
from recsys.serving.config import PeakPlan

WHOLE = ("models/ranker.safetensors", "index/ann.faiss", "reranker/1/double11.json")


@pytest.fixture
def run_with(tmp_path):
    def make(*files):
        fields = {
            "run_id": "r", "parent": None, "dataset_hash": "", "until": 0, "seed": 0, "config": {}, "versions": {},
            "commit": "", "feature_views": "", "measures": {},
            "rerankers": ["1"] if any(f.startswith("reranker") for f in files) else [],
        }  # fmt: skip
        with RunWriter(tmp_path / f"run-{len(files)}", fields) as writer:
            for name in files:
                writer.path(name).write_text("x")
        return RunDirectory.open(tmp_path / f"run-{len(files)}")

    return make


def test_a_whole_run_serves_the_arm_as_asked(run_with):
    assert served_arm("full", run_with(*WHOLE), reranker=True) == ARMS["full"]


def test_full_without_a_reranker_is_rank(run_with):
    assert served_arm("full", run_with(*WHOLE), reranker=False).tier is Tier.RANK
    assert served_arm("full", run_with(*WHOLE[:2]), reranker=True).tier is Tier.RANK


def test_a_source_without_its_index_is_left_out(run_with):
    arm = served_arm("rank", run_with(WHOLE[0]), reranker=True)
    assert "ann" not in {f.source for f in arm.feeds}
    assert len(arm.feeds) == len(ARMS["rank"].feeds) - 1


def test_what_cannot_be_served_is_refused(run_with):
    with pytest.raises(VersionMismatch, match="serve it with --arm retrieval"):
        served_arm("full", run_with(), reranker=True)
    with pytest.raises(BadInput, match="--arm: got best"):
        served_arm("best", run_with(*WHOLE), reranker=True)


@pytest.mark.parametrize(
    ("arm", "tier_best", "tier"),
    [
        ("full", None, Tier.FULL),
        ("full", Tier.FULL, Tier.FULL),
        ("full", Tier.RANK, Tier.RANK),
        ("full", Tier.RETRIEVAL, Tier.RETRIEVAL),
        ("full", Tier.POPULAR, Tier.POPULAR),
        ("rank", Tier.FULL, Tier.RANK),
    ],
)
def test_a_plan_lowers_the_tier_and_never_raises_it(arm, tier_best, tier):
    assert limited(ARMS[arm], PeakPlan(name="p", tier_best=tier_best)).tier is tier


def test_a_plan_sets_the_rerank_depth():
    assert limited(ARMS["full"], PeakPlan(name="p", rerank_items_max=7)).rerank_depth == 7
