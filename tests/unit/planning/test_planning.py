"""Estimates: capacity from a load report, scalers from the plan, embedding placement by TorchRec's planner."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml

from recsys.cli.main import run
from recsys.core import BadInput
from recsys.load import arrivals
from recsys.load.tally import Outcome, Tally
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


def served(shape: str, rate_per_s: float, capacity_per_s: float, tiers: Sequence[str] = ("rank",)) -> dict[str, Any]:
    """The report of a load run on a server that answers so many a second, one after another, and refuses the rest."""
    tally, free_s = Tally(100.0, 60.0), 0.0
    for n, at_s in enumerate(arrivals(shape, rate_per_s, 60.0, np.random.default_rng(7))):
        done_s = max(at_s, free_s) + 1 / capacity_per_s
        if done_s > at_s + 0.1:
            tally.add(Outcome(intended_s=at_s, sent_s=at_s, finished_s=at_s, status="RESOURCE_EXHAUSTED"))
            continue
        free_s = done_s
        tier = tiers[n % len(tiers)]
        tally.add(Outcome(intended_s=at_s, sent_s=at_s, finished_s=done_s, status="OK", tier=tier))
    return {**tally.report(60.0), "deadline_ms": 100.0}


@pytest.mark.parametrize(("shape", "rate_per_s"), [("double11", 50.0), ("step", 50.0), ("const", 400.0)])
def test_quiet_seconds_say_nothing_of_what_a_replica_can_do(shape: str, rate_per_s: float) -> None:
    plan = capacity_plan(served(shape, rate_per_s, 200.0), peak_per_s=20_000, replicas=ONE_EACH)
    right = 20_000 / (0.7 * 200)
    assert right <= plan.roles["gateway"].replicas <= 1.05 * right
    assert plan.roles["scoring"] == plan.roles["gateway"]


def test_answers_that_did_not_need_a_role_are_none_of_its_rate() -> None:
    mixed = served("step", 50.0, 200.0, tiers=["rank"] * 19 + ["popular"])
    roles = capacity_plan(mixed, peak_per_s=20_000, replicas=ONE_EACH).roles
    assert 0.8 * 200 < roles["scoring"].answers_per_s <= 0.95 * 200 < roles["gateway"].answers_per_s <= 200


def test_a_hiccup_in_a_quiet_run_is_no_saturation() -> None:
    rows = [{"second": s, "requests": 100, "within_deadline": 10 if s == 4 else 100} for s in range(20)]
    hiccup = {**REPORT, "seconds": rows, "tiers": {"rank": {"answers": 1910}}, "goodput_per_s": 95.5}
    assert capacity_plan(hiccup, peak_per_s=10, replicas=ONE_EACH).roles["gateway"].answers_per_s == 95.5


def test_caveats_are_said() -> None:
    easy = {**REPORT, "within_deadline": 2000, "tiers": {"rank": {"answers": 2000}}, "generator_lag_ms": {"p99": 50.0}}
    plan = capacity_plan(easy, peak_per_s=1000, replicas=ONE_EACH)
    assert len(plan.caveats) == 3
    assert "reranker" not in plan.roles
    assumed = capacity_plan(REPORT, peak_per_s=1000, replicas={"gateway": 3})
    assert assumed.roles["scoring"].replicas_measured == 1
    (caveat,) = assumed.caveats
    assert "--scoring-replicas N --reranker-replicas N" in caveat
    assert "--gateway-replicas" not in caveat


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


@pytest.mark.parametrize(
    ("peak_from", "peak_to", "code"),
    [
        ("0001-01-01", "0001-01-02", 2),
        ("0001-01-01T00:00+14:00", "0001-01-02", 2),
        ("2026-11-11", "9999-12-31T23:59:59-14:00", 2),
        ("9999-12-30", "9999-12-31T23:59:59.999999", 0),
    ],
)
def test_dates_at_the_ends_of_the_calendar(tmp_path, capsys, peak_from: str, peak_to: str, code: int) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(asdict(capacity_plan(REPORT, peak_per_s=1000, replicas=ONE_EACH))))
    peak = ["--peak-from", peak_from, "--peak-to", peak_to, "--lead-minutes", "1440", "--json"]
    assert run(["plan", "autoscale", str(plan), "--quiet-rate", "100", *peak]) == code
    assert ("error" in json.loads(capsys.readouterr().out)) == (code == 2)


def test_commands_hand_their_plans_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plan = tmp_path / "report.json", tmp_path / "plan.json"
    report.write_text(json.dumps(REPORT))
    assert run(["plan", "capacity", str(report), "--peak-rate", "1000", "--json"]) == 0
    plan.write_text(capsys.readouterr().out)
    assert run(["plan", "capacity", str(report), "--peak-rate", "1000"]) == 0
    out = capsys.readouterr().out
    assert "in flight at 1000/s: 20 at p50, 90 at p99" in out
    assert "caveat: one replica each" in out
    told = [part for role in ONE_EACH for part in (f"--{role}-replicas", "3")]
    assert run(["plan", "capacity", str(report), "--peak-rate", "1000", *told]) == 0
    assert "caveat" not in capsys.readouterr().out
    peak = ["--peak-from", "2026-11-10T16:00:00Z", "--peak-to", "2026-11-10T18:00:00Z"]
    assert run(["plan", "autoscale", str(plan), "--quiet-rate", "100", *peak]) == 0
    scalers = list(yaml.safe_load_all(capsys.readouterr().out))
    assert {(s["kind"], s["metadata"]["name"]) for s in scalers} == {
        ("ScaledObject", r) for r in ("gateway", "scoring", "reranker")
    }
    assert run(["plan", "autoscale", str(plan), "--quiet-rate", "100", "--shards", "2"]) == 0
    scalers = list(yaml.safe_load_all(capsys.readouterr().out))
    assert {(s["kind"], s["metadata"]["name"]) for s in scalers} == {
        ("HorizontalPodAutoscaler", r) for r in ("gateway", "scoring-0", "scoring-1", "reranker")
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


@pytest.mark.parametrize(
    ("tables", "others"),
    [
        ([{"rows": 1e6}], {}),
        ([{"rows": "1000"}], {}),
        ([{"rows": True}], {}),
        ([{"rows": 10**30}], {}),
        ([{"dim": 8.0}], {}),
        ([{"dim": 10**12}], {}),
        ([{"pooling": math.inf}], {}),
        ([{"pooling": "1"}], {}),
        ([{"name": "a.b"}], {}),
        ([{"name": ["a"]}], {}),
        ([{}, {}], {}),
        ([{}], {"batch_size": "1024"}),
        ([{}], {"batch_size": math.inf}),
        ([{}], {"topology": {"world_size": 2.0}}),
        ([{}], {"topology": {"world_size": 2, "hbm_gib": math.nan}}),
        ([{}], {"topology": {"world_size": 2, "per_host": 0}}),
    ],
)
def test_numbers_and_names_that_the_planner_cannot_take_are_refused(tmp_path, capsys, tables, others) -> None:
    path = tmp_path / "tables.json"
    described = [{"name": "t", "rows": 100, "dim": 8, **table} for table in tables]
    path.write_text(json.dumps({"topology": {"world_size": 2}, "tables": described, **others}))
    assert run(["plan", "embeddings", str(path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "BAD_INPUT"


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
