"""replay() on real baskets: files, figures that recompute, no look into the future, refusals."""

import asyncio
import json

import polars as pl
import pytest

from recsys.cli.main import run as double11
from recsys.core import BadInput, Conflict, CorruptData, NotFound, VersionMismatch
from recsys.data import Dataset
from recsys.replay import recompute, replay
from recsys.replay.compare import FILES, answer
from recsys.replay.protocol import Past

ARMS = ("popular", "own_history", "item_knn", "retrieval")
WEEK_US = 7 * 86_400_000_000


@pytest.fixture(scope="module")
def frozen(shop, light_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports") / "frozen"
    return replay(shop, light_run, out, arms=ARMS), out


def test_the_report_has_what_the_design_says(frozen):
    report, out = frozen
    assert json.loads((out / "report.json").read_text()) == report
    assert {
        "dataset", "task", "from", "to", "positives", "seed", "queries", "arms", "protocol", "commit", "hardware",
        "pairs",
    } <= report.keys()  # fmt: skip
    assert list(report["arms"]) == list(ARMS)
    measured = {"recall@10", "recall@20", "recall@100", "ndcg@10", "ndcg@20", "hr@10", "mrr@10", "coverage@10"}
    for arm in report["arms"].values():
        assert measured | {"fallbacks", "ci95", "latency_ms"} <= arm.keys()
        assert arm["ci95"]["ndcg@10"][0] <= arm["ndcg@10"] <= arm["ci95"]["ndcg@10"][1]
        assert arm["fallbacks"] == 0
        assert 0 < arm["latency_ms"]["p50"] <= arm["latency_ms"]["p99"]
    assert report["from"] == "2017-12-04T00:00:00Z"
    assert set(report["pairs"]) == {f"retrieval-{arm}" for arm in ARMS[:-1]}
    assert pl.read_parquet(out / "slates.parquet").columns == ["arm", "query_id", "user_id", "rank", "item_id", "score"]
    assert pl.read_parquet(out / "queries.parquet").columns == ["query_id", "user_id", "query_time", "relevant", "rare"]
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page


def test_every_figure_recomputes_from_the_files(frozen):
    report, out = frozen
    again = recompute(out)
    assert again["queries"] == report["queries"] > 30
    assert again["pairs"] == report["pairs"]
    assert again["rare_items"] == report["rare_items"]
    for name, figures in again["arms"].items():
        assert figures == {key: report["arms"][name][key] for key in figures}


def test_own_history_repeats_what_was_bought_and_new_only_never_does(shop, light_run, frozen, cut_us, tmp_path):
    report, _ = frozen
    assert report["arms"]["own_history"]["ndcg@10"] > 2 * report["arms"]["popular"]["ndcg@10"]
    new = replay(shop, light_run, tmp_path / "new", arms=["popular", "item_knn"], task="new-only")
    bought = Dataset.open(shop).events(before_us=cut_us).select("user_id", "item_id")
    bought = bought.filter(pl.len().over("user_id") <= 1_000)  # beyond 1,024 rows the store forgets the oldest pairs
    slates = pl.read_parquet(tmp_path / "new" / "slates.parquet")
    assert set(bought["user_id"]) & set(slates["user_id"])
    assert not len(slates.join(bought, on=["user_id", "item_id"]))
    assert new["queries"] <= report["queries"]


def test_nothing_from_the_cut_on_is_seen(shop, truncated, light_run, make_light_run, frozen, cut_us, tmp_path):
    """Indexes, catalogue and features made from data that ends at the cut give the very same slates."""
    _, out = frozen
    run = make_light_run(truncated, tmp_path / "run", cut_us)
    queries = pl.read_parquet(out / "queries.parquet")
    past = Past(Dataset.open(truncated).event_batches())
    answers = asyncio.run(answer(run, ARMS, queries, past, k=100, task="all", seed=0))
    again = pl.concat([frame for a in answers.values() for frame in a.slates])
    assert again.equals(pl.read_parquet(out / "slates.parquet"))


@pytest.mark.parametrize(("protocol", "task"), [("frozen", "all"), ("frozen", "new-only"), ("online", "all")])
def test_what_is_learnt_later_is_not_seen(shop, learnt_late, light_run, cut_us, tmp_path, protocol, task):
    options = {"arms": ["own_history", "item_knn"], "to_us": cut_us + WEEK_US, "protocol": protocol, "task": task}
    for data, name in ((shop, "at-once"), (learnt_late, "late")):
        replay(data, light_run, tmp_path / name, queries_max=50, **options)
    for name in ("queries.parquet", "slates.parquet"):
        assert (tmp_path / "late" / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()


def test_online_asks_before_each_basket_and_every_arm_gets_the_same_updates(shop, light_run, frozen, cut_us, tmp_path):
    options = {"arms": ["popular", "own_history"], "to_us": cut_us + WEEK_US}
    online = replay(shop, light_run, tmp_path / "online", protocol="online", **options)
    queries = pl.read_parquet(tmp_path / "online" / "queries.parquet")
    assert online["protocol"] == "online"
    assert online["queries"] == len(queries) > queries["user_id"].n_unique()
    assert queries["query_time"].is_sorted()
    events = Dataset.open(shop).events().with_columns(at=pl.col("event_time").dt.epoch("us"))
    slates = pl.read_parquet(tmp_path / "online" / "slates.parquet").filter(pl.col("arm") == "own_history")
    shown = slates.join(queries.select("query_id", "query_time"), on="query_id")
    before = shown.join(events.select("user_id", "item_id", "at"), on=["user_id", "item_id"])
    known = before.group_by("query_id", "item_id").agg(ok=(pl.col("at") < pl.col("query_time")).any())
    assert len(known) == len(slates)
    assert known["ok"].all()
    bought_since = before.filter(pl.col("at").is_between(cut_us, pl.col("query_time"), closed="left"))
    assert len(bought_since), "purchases after the cut reach later queries"
    assert recompute(tmp_path / "online")["pairs"] == online["pairs"]


def test_a_sample_is_the_same_every_time(shop, light_run, tmp_path):
    options = {"arms": ["own_history"], "queries_max": 9, "seed": 5, "k": 10}
    one = replay(shop, light_run, tmp_path / "a", **options)
    replay(shop, light_run, tmp_path / "b", **options)
    assert one["queries"] == 9
    for name in ("slates.parquet", "queries.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"arms": ["popular", "magic"]}, BadInput, "item_knn"),
        ({"arms": []}, BadInput, "some of"),
        ({"positives": ["buy"]}, BadInput, "purchase"),
        ({"positives": ["cart"]}, BadInput, "none in"),
        ({"from_us": 1_512_345_600_000_000 - WEEK_US}, VersionMismatch, "trained until 2017-12-04T00:00:00Z"),
        ({"from_us": 4_000_000_000_000_000}, BadInput, "last event"),
        ({"to_us": 1}, BadInput, "from < to"),
        ({"k": 0}, BadInput, "1 to 1000"),
        ({"k": 100_000}, BadInput, "1 to 1000"),
        ({"protocol": "frosty"}, BadInput, "frozen or online"),
        ({"task": "some"}, BadInput, "new-only"),
    ],
)
def test_what_cannot_be_replayed_is_refused_and_leaves_nothing(shop, light_run, tmp_path, options, error, says):
    with pytest.raises(error, match=says):
        replay(shop, light_run, tmp_path / "out", **{"arms": ["popular"], **options})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_report_is_not_replaced(shop, light_run, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(Conflict, match="no report"):
        replay(shop, light_run, tmp_path, arms=["popular"])
    with pytest.raises(Conflict, match="no report"):
        replay(shop, light_run, tmp_path / "precious.txt", arms=["popular"])
    with pytest.raises(NotFound, match="double11 train"):
        replay(shop, tmp_path / "nowhere", tmp_path / "out", arms=["popular"])
    with pytest.raises(NotFound, match="dataset"):
        replay(tmp_path / "nowhere", light_run, tmp_path / "out", arms=["popular"])
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_report_is_replaced_and_nothing_beside_it(shop, light_run, frozen, tmp_path, monkeypatch):
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.json").write_text('{"goodput_per_s": 3.0}')  # of a load run
    with pytest.raises(Conflict, match="no report"):
        replay(shop, light_run, out, arms=["popular"])
    (out / "report.json").write_bytes((frozen[1] / "report.json").read_bytes())
    (out / "run").mkdir()
    with pytest.raises(Conflict, match="no report: run in it"):
        replay(shop, light_run, out, arms=["popular"])
    (out / "run").rmdir()
    monkeypatch.chdir(out)
    command = ["replay", str(shop), "--run", str(light_run.root), "--arms", "popular", "--out", "."]
    assert double11(command) == 0
    assert {path.name for path in out.iterdir()} == {*FILES}
    assert list(json.loads((out / "report.json").read_text())["arms"]) == ["popular"]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_damaged_run_is_refused(shop, make_light_run, cut_us, tmp_path):
    run = make_light_run(shop, tmp_path / "run", cut_us)
    file = run.path("index/popular.parquet")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CorruptData, match="popular"):
        replay(shop, run.root, tmp_path / "out", arms=["popular"])


def test_the_command_gates_and_names_the_page_last(shop, light_run, tmp_path, capsys):
    base = ["replay", str(shop), "--run", str(light_run.root), "--arms", "popular,own_history", "--out"]
    assert double11([*base, str(tmp_path / "one"), "--to", "2017-12-20"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(tmp_path / "one" / "report.html")
    assert any(line.startswith("own_history ") for line in out)
    gate = ["--compare", str(tmp_path / "one"), "--to", "2017-12-20T00:00:00Z", "--json"]
    assert double11([*base, str(tmp_path / "two"), *gate, "--fail-if", "ndcg@10<-2%"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"] == "frozen"
    assert double11([*base, str(tmp_path / "two"), *gate, "--fail-if", "popular:recall@100<=0%"]) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["code"] == "GATE_NOT_MET"
    assert double11([*base, str(tmp_path / "three"), "--fail-if", "rm -rf"]) == 2
    assert double11([*base, str(tmp_path / "three"), "--from", "last week"]) == 2
    assert double11([*base, str(tmp_path / "three"), "--compare", str(tmp_path), "--fail-if", "ndcg@10<1%"]) == 2
    assert not (tmp_path / "three").exists()
