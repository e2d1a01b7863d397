"""Several cuts and seeds in one report: trained at each cut, pooled by user, and never done twice."""

import json

import polars as pl
import pytest

from recsys.cli.main import run as double11
from recsys.core import BadInput
from recsys.data import Dataset, simulate
from recsys.evaluation import MEASURES
from recsys.replay import Rolling, replay
from recsys.replay.compare import iso
from recsys.replay.rolling import _answers, pool

SMALL = """
[training]
windows = 2
queries_per_window_max = 40
tower_epochs = 1
tower_examples_max = 2000
ranker_epochs = 1
ranker_steps_min = 1
[models.tower]
dim = 16
heads = 2
[models.ranker]
dim = 4
hidden = 8
[llm_reranker.distill]
hidden_size = 32
num_layers = 1
num_experts = 4
expert_width = 16
teacher_hidden_size = 32
teacher_layers = 1
vocab_size = 512
train_queries_max = 16
validation_queries_max = 8
student_epochs = 1
"""
ARMS = ("popular", "own_history", "lambdamart", "full_nollm", "retrieval", "rank", "full")


def test_a_rolling_comparison_goes_on_where_it_was(tmp_path):
    simulate("tiny", 0, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    span_us = dataset.last_event_us - dataset.first_event_us
    cuts = ",".join(iso(dataset.first_event_us + span_us * share // 10) for share in (7, 8))
    (tmp_path / "double11.toml").write_text(SMALL)
    command = [
        "replay", str(dataset.root), "--out", str(tmp_path / "report"), "--cuts", cuts, "--seeds", "1",
        "--arms", ",".join(ARMS), "--config", str(tmp_path / "double11.toml"),
    ]  # fmt: skip
    assert double11(command) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert tuple(report["arms"]) == ARMS
    assert set(report["arms"]["rank"]["by_cut"]) == set(report["cuts"])
    assert report["arms"]["popular"]["seeds_sd"]["ndcg@10"] == 0
    compared = {f"full-{arm}" for arm in ARMS if arm != "full"}
    assert compared | {"rank-lambdamart", "rank-popular", "retrieval-popular"} <= set(report["pairs"])
    assert set(report["rare_items"]["arms"]) == set(ARMS if report["rare_items"]["queries"] else ())
    for folder in (tmp_path / "report.work").glob("report-*"):
        arms = json.loads((folder / "report.json").read_text())["arms"]
        slates = pl.read_parquet(folder / "slates.parquet")
        ranked = slates.filter(pl.col("arm") == "rank").select("query_id", "rank", "item_id")
        for arm in ("full", "full_nollm"):
            if not arms[arm]["rerank_weight"]:  # never worse where nothing was gained: the ranker's very order
                assert slates.filter(pl.col("arm") == arm).select(ranked.columns).equals(ranked)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "report.work").rglob("manifest.json")}
    assert len([p for p in made if p.parent.name.startswith("run-") and p.parent.parent.name == "report.work"]) == 2
    assert double11(command) == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())["arms"] == report["arms"]
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "report.work").rglob("manifest.json")}
    assert double11([*command, "--fail-if", "rank:ndcg@10>=0"]) == 3
    (tmp_path / "double11.toml").write_text(SMALL.replace("student_epochs = 1", "student_epochs = 2"))
    assert double11([*command, "--queries-max", "3", "--arms", "rank,full"]) == 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())["queries"] == 2 * 3 < report["queries"]
    kept = [json.loads(p.read_text()) for p in (tmp_path / "report.work").glob("report-*/report.json")]
    assert [(r["reranker"], r["queries"]) for r in kept] == [("2", 3)] * 2


def test_queries_count_once_however_many_seeds():
    rows = [  # arm, cut, seed, query, user, value of every measure
        ("popular", 1, 0, "a@1", "a", 0.5), ("popular", 2, 0, "a@2", "a", 0.1), ("popular", 2, 0, "b@2", "b", 0.3),
        ("rank", 1, 0, "a@1", "a", 1.0), ("rank", 2, 0, "a@2", "a", 0.0), ("rank", 2, 0, "b@2", "b", 0.2),
        ("rank", 1, 1, "a@1", "a", 0.5), ("rank", 2, 1, "a@2", "a", 0.2), ("rank", 2, 1, "b@2", "b", 0.8),
    ]  # fmt: skip
    frame = pl.DataFrame(rows, schema=["arm", "cut", "seed", "query_id", "user_id", "value"], orient="row")
    pooled = pool(frame.with_columns(pl.col("value").alias(m) for m in MEASURES), ("popular", "rank"))
    assert pooled["queries"] == 3
    assert pooled["arms"]["popular"]["ndcg@10"] == pytest.approx(0.3)
    assert pooled["arms"]["rank"]["ndcg@10"] == pytest.approx((0.75 + 0.1 + 0.5) / 3)
    assert [v["ndcg@10"] for v in pooled["arms"]["rank"]["by_cut"].values()] == pytest.approx([0.75, 0.3])
    assert pooled["pairs"]["rank-popular"]["ndcg@10"]["diff"] == pytest.approx(0.15)
    assert pooled["pairs"]["rank-popular"]["ndcg@10"]["ratio"] == pytest.approx(1.5)


@pytest.mark.parametrize("cuts", [(), (5, 5), (5, 3), (5, 9)])
def test_cuts_ascend_and_end_before_the_period(cuts):
    with pytest.raises(BadInput, match="--cuts"):
        Rolling(cuts=cuts, to_us=9, seeds=(0,), arms=("popular",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run", "run"], "--run: got with --cuts"),
        (["--from", "2011-01-01"], "--from: got with --cuts"),
        (["--k", "10", "--seed", "0"], "--k, --seed: got with --cuts"),
        (["--protocol", "online"], "--protocol: got with --cuts"),
        (["--compare", "base"], "--compare: got with --cuts"),
        (["--fail-if", "nonsense"], "--fail-if: got nonsense"),
        (["--fail-if", "ndcg@10<-2%"], "a base to change from"),
        (["--seeds", "1,-1"], "--seeds: got 1,-1"),
        (["--arms", "rank,magic"], "--arms: got magic"),
    ],
)
def test_what_a_rolling_comparison_would_drop_is_refused_before_any_work(tmp_path, capsys, options, said):
    command = ["replay", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--cuts", "2011-01-01"]
    assert double11([*command, "--to", "2012-01-01", "--protocol", "frozen", *options]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_needs_cuts_is_refused_without_them(tmp_path, capsys):
    command = ["replay", str(tmp_path), "--run", "run", "--out", str(tmp_path / "out")]
    assert double11([*command, "--seeds", "0,1", "--work", "work"]) == 2
    assert "--seeds, --work: got no --cuts" in capsys.readouterr().err


def test_a_rolling_report_replaces_no_other_folder(tmp_path, capsys):
    (tmp_path / "report.json").write_text('{"arms": {}, "protocol": "frozen", "task": "all"}')
    (tmp_path / "precious.txt").write_text("keep me")
    command = ["replay", str(tmp_path / "data"), "--out", str(tmp_path), "--cuts", "2011-01-01", "--to", "2012-01-01"]
    assert double11(command) == 1
    assert "precious.txt" in capsys.readouterr().err


def test_kept_reports_of_other_questions_are_made_again(shop, light_run, cut_us, tmp_path):
    end_us, out = Dataset.open(shop).last_event_us + 1, tmp_path / "report"

    def answered(queries_max, **how):
        """Whether the report answers seeds 0, and seeds 1 and 0."""
        if how:
            replay(shop, light_run, out, arms=["popular"], to_us=end_us, queries_max=queries_max, **how)
        asked = {"cuts": (cut_us,), "to_us": end_us, "arms": ("popular",), "queries_max": queries_max}
        return [_answers(out, light_run, Rolling(seeds=seeds, **asked), end_us) for seeds in ((0,), (1, 0))]

    assert answered(None, seed=5) == [True, True]
    assert answered(5, seed=5, queries_seed=0) == [True, False]
    assert answered(5, k=10) == [False, False]
    assert answered(5, seed=1) == [False, True]
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({k: v for k, v in report.items() if k != "queries_seed"}))
    assert answered(5) == [False, False]


def test_a_run_or_cuts(tmp_path, capsys):
    assert double11(["replay", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "--cuts" in capsys.readouterr().err
