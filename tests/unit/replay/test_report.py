"""The pieces of a report without a run: figures, gates, the page, bringing the past forward."""

import json
import re

import polars as pl
import pytest

from recsys.core import BadInput, CorruptData, EventBatch, EventKind, EventType, GateNotMet, NotFound, VersionMismatch
from recsys.replay import check_gates, check_grammar, read_report
from recsys.replay.figures import compute, reference_arm
from recsys.replay.page import render
from recsys.replay.protocol import Past

QUERIES = pl.DataFrame(
    {
        "query_id": ["a@9", "b@9"],
        "user_id": ["a", "b"],
        "query_time": [9, 9],
        "relevant": [["x"], ["y", "z"]],
        "rare": [[], ["z"]],
    },
    schema_overrides={"rare": pl.List(pl.String)},
)


def slates(**arms: list[list[str]]) -> pl.DataFrame:
    rows = [
        (arm, f"{user}@9", user, place + 1, item, 1.0 - place)
        for arm, lists in arms.items()
        for user, items in zip("ab", lists, strict=True)
        for place, item in enumerate(items)
    ]
    return pl.DataFrame(rows, schema=["arm", "query_id", "user_id", "rank", "item_id", "score"], orient="row")


SLATES = slates(popular=[["y", "x"], ["x", "w"]], full=[["x"], ["z", "y"]])


def report(**changes) -> dict:
    found = compute(SLATES, QUERIES, ["popular", "full"], num_items=8, seed=1)
    for arm in found["arms"].values():
        arm |= {"fallbacks": 0, "latency_ms": {"p50": 1.0, "p99": 2.0}}
    return {
        "dataset": {"name": "<b>shop</b>", "source": "s", "hash": "0" * 64},
        "run": "r1",
        "protocol": "frozen",
        "task": "all",
        "from": "2020-01-01T00:00:00Z",
        "to": "2020-02-01T00:00:00Z",
        "positives": ["purchase"],
        "seed": 1,
        "catalogue_items": 8,
        "commit": "abc",
        "hardware": {"cpu": "one"},
        **found,
        **changes,
    }


def test_figures_by_hand():
    found = compute(SLATES, QUERIES, ["popular", "full"], num_items=8, seed=1)
    assert found["queries"] == 2
    assert found["arms"]["full"]["ndcg@10"] == 1.0
    assert found["arms"]["full"]["coverage@10"] == 3 / 8
    assert found["arms"]["popular"]["mrr@10"] == 0.25
    assert found["arms"]["popular"]["recall@10"] == 0.5
    assert list(found["pairs"]) == ["full-popular"]
    assert found["pairs"]["full-popular"]["ndcg@10"]["diff"] == pytest.approx(1 - 0.315465, abs=1e-5)
    assert reference_arm(["a", "b"]) == "b"
    assert reference_arm(["full", "b"]) == "full"


def test_rare_items_are_measured_alone():
    found = compute(SLATES, QUERIES, ["popular", "full"], num_items=8, seed=1)["rare_items"]
    assert found["queries"] == 1
    assert (found["arms"]["full"]["ndcg@10"], found["arms"]["popular"]["ndcg@10"]) == (1.0, 0.0)
    assert found["pairs"]["full-popular"]["ndcg@10"]["diff"] == 1.0
    none = QUERIES.with_columns(rare=pl.lit([], pl.List(pl.String)))
    assert compute(SLATES, none, ["full"], num_items=8, seed=1)["rare_items"]["queries"] == 0


def test_an_arm_without_any_slate_scores_zero():
    found = compute(slates(full=[["x"], []]), QUERIES, ["silent", "full"], num_items=8, seed=1)
    assert found["arms"]["silent"]["ndcg@10"] == 0.0
    assert found["arms"]["full"]["hr@10"] == 0.5


def test_gates():
    now, base = report(), report()
    base["arms"]["full"]["ndcg@10"] = 0.9
    check_gates(now, None, ["ndcg@10<0.9", "popular:ndcg@10>0.9", "latency_ms.p99>=2.5"])
    check_gates(now, base, ["ndcg@10<-2%", "recall@10<0%", "popular:latency_ms.p50 > 20%"])
    with pytest.raises(GateNotMet, match=r"full ndcg@10 went from 0\.9000 to 1\.0000 \(\+11\.11 %\)"):
        check_gates(now, base, ["ndcg@10>10%"])
    with pytest.raises(GateNotMet, match="latency_ms"):
        check_gates(now, None, ["latency_ms.p99>=2"])


@pytest.mark.parametrize(
    "text", ["ndcg@10", "ndcg@10 is bad", "<3", "ndcg@10<x", "__import__('os')<1", "ndcg@10==1", ""]
)
def test_what_is_no_gate_is_refused_before_any_work(text):
    with pytest.raises(BadInput, match="--fail-if"):
        check_grammar([text])


def test_a_change_needs_a_base_to_change_from():
    check_grammar(["ndcg@10<1"], based=False)
    with pytest.raises(BadInput, match="--compare"):
        check_grammar(["ndcg@10<1", "ndcg@10<-2%"], based=False)


def test_gates_name_what_is_not_there():
    for text in ("nobody:ndcg@10<1", "ndcg@11<1", "ci95<1", "latency_ms.p42<1"):
        with pytest.raises(BadInput):
            check_gates(report(), None, [text])
    with pytest.raises(BadInput, match="--compare"):
        check_gates(report(), None, ["ndcg@10<-2%"])
    for other in ({"k": 10}, {"queries_max": 40}, {"queries_max": 40, "queries_seed": 1}):
        with pytest.raises(VersionMismatch, match=f"{list(other)[-1]} None"):
            check_gates(report(**other), report(), ["ndcg@10<-2%"])
    with pytest.raises(VersionMismatch, match="protocol online"):
        check_gates(report(), report(protocol="online"), ["ndcg@10<-2%"])


def test_the_page_escapes_what_comes_from_data_and_fetches_nothing():
    page = render(report(), SLATES, QUERIES, {"x": "<script>alert(1)</script>", "y": "tea & cups"})
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ✓" in page
    assert "tea &amp; cups" in page
    assert "Items with fewer than 5 events" in page
    assert "&lt;b&gt;shop" in page
    assert "<svg" in page
    assert not re.search(r"https?://|@import|url\(|\ssrc=|\shref=", page)


def test_reading_a_report_that_is_none(tmp_path):
    with pytest.raises(NotFound, match="double11 replay"):
        read_report(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(CorruptData):
            read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report()))
    assert read_report(tmp_path)["run"] == read_report(tmp_path / "report.json")["run"] == "r1"


def views(times: list[int], **columns: list[int]) -> EventBatch:
    n = len(times)
    return EventBatch.from_columns(
        {
            "event_id": [f"e{n}" for n in range(n)],
            "kind": [int(EventKind.ACTION)] * n,
            "event_type": [int(EventType.VIEW)] * n,
            "event_time": times,
            "user_id": ["u"] * n,
            "item_id": ["i"] * n,
            **columns,
        }
    )


def test_the_past_holds_what_is_strictly_before_and_comes_in_any_steps():
    past = Past(views([10, 20, 20, 30, 40, 50]).chunks(2))
    assert [past.advance(t) for t in (10, 20, 21, 45, 45, 1_000)] == [0, 1, 2, 2, 0, 1]
    assert past.store.max_event_time_us() == 50


@pytest.mark.parametrize("rows_max", [1, 2, 3, 6])
def test_the_past_holds_what_was_learnt_late_from_then_on(rows_max):
    late = views([10, 20, 20, 30, 40, 50], known_at=[35, 20, 41, 30, 40, 90])
    past = Past(late.chunks(rows_max))
    assert [past.advance(t) for t in (20, 21, 36, 41, 42, 90, 91)] == [0, 1, 2, 1, 1, 0, 1]
    assert Past(late.chunks(rows_max)).advance(41) == 4  # as a frozen replay: once, at the cut
