"""Estimates: capacity from a load report, scalers from the plan, embedding placement by TorchRec's planner."""

import json
import math
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from recsys.cli.main import run
from recsys.core import BadInput
from recsys.planning import Schedule, capacity_plan, manifests

# Half of the good answers were full, 40 % rank, 10 % popular; 100 of 200 requests a second were good.
REPORT: dict[str, Any] = {
    "requests": 2000,
    "within_deadline": 1000,
    "goodput_per_s": 100.0,
    "deadline_ms": 100.0,
    "latency_ms": {"p50": 20.0, "p99": 90.0},
    "generator_lag_ms": {"p99": 1.0},
    "tiers": {"full": {"answers": 500}, "rank": {"answers": 400}, "popular": {"answers": 100}},
}
ONE_EACH = {"gateway": 1, "scoring": 1, "reranker": 1}


def test_replicas_follow_the_formula() -> None:
    plan = capacity_plan(REPORT, peak_per_s=1000, replicas={"gateway": 1, "scoring": 2, "reranker": 1}, headroom=0.2)
    assert plan.roles["gateway"].replicas == math.ceil(1000 / (0.8 * 100))
    assert plan.roles["scoring"].replicas == math.ceil(1000 / (0.8 * 90 / 2))
    assert plan.roles["reranker"].replicas == math.ceil(1000 / (0.8 * 50))
    assert (plan.in_flight_p50, plan.in_flight_p99) == (20, 90)  # Little: 1000/s * 0.02 s, 1000/s * 0.09 s
    assert plan.caveats == ()


def test_caveats_are_said() -> None:
    easy = {**REPORT, "within_deadline": 2000, "tiers": {"rank": {"answers": 2000}}, "generator_lag_ms": {"p99": 50.0}}
    plan = capacity_plan(easy, peak_per_s=1000, replicas=ONE_EACH)
    assert len(plan.caveats) == 3
    assert "reranker" not in plan.roles


@pytest.mark.parametrize(
    ("report", "options", "message"),
    [
        ({**REPORT, "goodput_per_s": None}, {}, "goodput_per_s"),
        ({**REPORT, "requests": "many"}, {}, "requests"),
        ({**REPORT, "latency_ms": {}}, {}, "p50"),
        ({**REPORT, "within_deadline": 0}, {}, "no answer within its deadline"),
        (REPORT, {"peak_per_s": 0}, "--peak-rate"),
        (REPORT, {"headroom": 1.0}, "--headroom"),
        (REPORT, {"replicas": {"gateway": 0}}, "--gateway-replicas"),
    ],
)
def test_unusable_input_is_refused(report: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        capacity_plan(report, **{"peak_per_s": 10.0, "replicas": ONE_EACH, **options})


def test_hpa_is_valid_and_between_quiet_and_surprise() -> None:
    plan = capacity_plan(REPORT, peak_per_s=1000, replicas=ONE_EACH)
    for scaler in manifests(plan, quiet_per_s=100, schedule=None):
        kubernetes_validate.validate(scaler, "1.37", strict=True)
        needed = plan.roles[scaler["metadata"]["name"]].replicas
        assert scaler["spec"]["minReplicas"] == max(2, math.ceil(needed / 10))
        assert scaler["spec"]["maxReplicas"] == math.ceil(1.5 * needed)


def test_peak_is_scaled_before_it_starts() -> None:
    plan = capacity_plan(REPORT, peak_per_s=1000, replicas=ONE_EACH)
    start = datetime(2026, 11, 10, 16, 0, tzinfo=UTC)  # midnight in Beijing
    schedule = Schedule(start=start, end=start + timedelta(hours=2), lead=timedelta(minutes=20))
    for scaler in manifests(plan, quiet_per_s=100, schedule=schedule):
        cron = scaler["spec"]["triggers"][0]["metadata"]
        assert (cron["start"], cron["end"], cron["timezone"]) == ("40 15 10 11 *", "0 18 10 11 *", "Etc/UTC")
        assert int(cron["desiredReplicas"]) == plan.roles[scaler["metadata"]["name"]].replicas
        assert scaler["spec"]["minReplicaCount"] < int(cron["desiredReplicas"]) < scaler["spec"]["maxReplicaCount"]


def test_schedule_ends_after_it_starts() -> None:
    now = datetime(2026, 11, 11, tzinfo=UTC)
    with pytest.raises(BadInput, match="end after its start"):
        Schedule(start=now, end=now)


def test_commands_hand_their_plans_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plan = tmp_path / "report.json", tmp_path / "plan.json"
    report.write_text(json.dumps(REPORT))
    assert run(["plan", "capacity", str(report), "--peak-rate", "1000", "--json"]) == 0
    plan.write_text(capsys.readouterr().out)
    assert run(["plan", "capacity", str(report), "--peak-rate", "1000"]) == 0
    assert "in flight at 1000/s: 20 at p50, 90 at p99" in capsys.readouterr().out
    peak = ["--peak-from", "2026-11-10T16:00:00Z", "--peak-to", "2026-11-10T18:00:00Z"]
    assert run(["plan", "autoscale", str(plan), "--quiet-rate", "100", *peak]) == 0
    scalers = list(yaml.safe_load_all(capsys.readouterr().out))
    assert {(s["kind"], s["metadata"]["name"]) for s in scalers} == {
        ("ScaledObject", r) for r in ("gateway", "scoring", "reranker")
    }


@pytest.mark.parametrize(
    ("content", "args", "code"),
    [
        ("{", ["capacity", "FILE", "--peak-rate", "1"], 2),
        (None, ["capacity", "FILE", "--peak-rate", "1"], 2),
        ("{}", ["autoscale", "FILE", "--quiet-rate", "1"], 2),
        ("[]", ["embeddings", "FILE"], 2),
        ('{"tables": [{"name": "t", "rows": 0, "dim": 8}], "topology": {"world_size": 1}}', ["embeddings", "FILE"], 2),
        ('{"tables": [{"name": "t", "columns": 8}], "topology": {"world_size": 1}}', ["embeddings", "FILE"], 2),
    ],
)
def test_bad_files_are_exit_code_2(tmp_path: Path, content: str | None, args: list[str], code: int) -> None:
    path = tmp_path / "input.json"
    if content is not None:
        path.write_text(content)
    assert run(["plan", *(str(path) if a == "FILE" else a for a in args)]) == code


def test_planner_places_every_table_inside_the_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [
        {"name": "item", "rows": 100_000_000, "dim": 64},
        {"name": "user", "rows": 1_000_000, "dim": 64, "pooling": 20},
    ]
    description = {"topology": {"world_size": 4, "hbm_gib": 40}, "batch_size": 512, "tables": tables}
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(description))
    assert run(["plan", "embeddings", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {t["table"] for t in found["tables"]} == {"item", "user"}
    weights_gib = (100_000_000 + 1_000_000) * 64 * 4 / 2**30
    memory = found["memory_gib_by_rank"]
    assert len(memory) == 4
    assert weights_gib <= sum(memory.values())
    assert max(memory.values()) <= 40
    assert found["step_ms_estimate"] > 0


def test_a_cluster_too_large_to_search_gets_a_plan_and_says_whose_estimate_it_is(tmp_path, capsys) -> None:
    tables = [{"name": "item", "rows": 40_000_000, "dim": 256, "pooling": 50}]
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"topology": {"world_size": 96, "hbm_gib": 16}, "tables": tables}))
    assert run(["plan", "embeddings", str(path)]) == 0
    said = capsys.readouterr().out
    assert "EmbeddingShardingPlanner, not a measurement" in said
    assert re.search(r"item +\w+ +fused", said)
    assert re.search(r"step, ms: [\d.]+", said)


def test_tables_that_fit_nowhere_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tables.json"
    tables = [{"name": "item", "rows": 10_000_000_000, "dim": 256}]
    path.write_text(json.dumps({"topology": {"world_size": 1, "hbm_gib": 16, "ddr_gib": 16}, "tables": tables}))
    assert run(["plan", "embeddings", str(path), "--json"]) == 2
    assert "Add ranks or memory" in capsys.readouterr().out
