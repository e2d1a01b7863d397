"""produce, ingest, dead-letter, forget, features: the commands as typed, and what they answer to bad input."""

import json
import shutil
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from recsys.cli.main import run
from recsys.data import Dataset, simulate, write_dataset
from streaming.codec import decode_events
from streaming.job import Job
from streaming.log import open_log
from streaming.log.base import read_all


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "tiny"
    simulate("tiny", 3, out)
    return out


@pytest.fixture
def url(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("DOUBLE11_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOUBLE11__FEATURE_STORE__CLOCK", "data")
    return f"embedded:{tmp_path / 'home'}"


@pytest.fixture
def double11(capfd):
    """Run a command line with --json; gives its exit code and its document."""

    def call(*args: object) -> tuple[int, dict]:
        code = run([*map(str, args), "--json"])
        return code, json.loads(capfd.readouterr().out.splitlines()[-1])

    return call


def test_a_dataset_goes_through_log_store_and_archive_and_comes_back(double11, dataset, url, tmp_path):
    events = Dataset.open(dataset).events()
    assert double11("streaming", "init")[0] == 0
    _, produced = double11("produce", dataset, "--sink", url)
    assert produced["events"] >= len(events)
    archive = tmp_path / "archive"
    code, report = double11("ingest", "--source", url, "--store", url, "--archive", archive, "--until-caught-up")
    assert code == 0
    assert report["events"] == {"applied": produced["events"]}
    user, item = events["user_id"][-1], events["item_id"][-1]
    ask = ("features", "get", "--user", user, "--item", item, "--item", "unknown")
    code, streamed = double11(*ask)
    assert code == 0
    assert [(e["kind"], e["id"]) for e in streamed["entities"]] == [("user", user), ("item", item), ("item", "unknown")]
    views, cells = streamed["entities"][0]["features"], streamed["entities"][2]["features"].values()
    assert set(views["view_count_all"]) == {"status", "value", "event_time", "age_s"}
    assert views["view_count_all"]["value"] == events.filter(user_id=user, event_type="view").height
    assert {f["status"] for f in cells} == {"NOT_FOUND"}
    # The archive is a dataset: it has the same events, and folds to the same features.
    back = Dataset.open(archive)
    assert set(back.events()["event_id"]) == set(events["event_id"])
    assert set(back.items()["item_id"]) >= set(events["item_id"])
    assert double11("features", "materialize", archive)[0] == 0
    assert double11(*ask)[1]["entities"] == streamed["entities"]


def test_ingest_leaves_its_partitions_with_an_archive_that_is_whole(double11, dataset, url, tmp_path, monkeypatch):
    """Who takes them over goes on from what the archive covers."""
    archive, left, close = tmp_path / "archive", [], Job.close

    def leave(job: Job) -> None:
        left.append((bool(list(archive.glob("coverage/*.json"))), list(archive.glob("journal/*.arrow"))))
        close(job)

    monkeypatch.setattr(Job, "close", leave)
    double11("streaming", "init")
    double11("produce", dataset, "--sink", url)
    assert double11("ingest", "--source", url, "--store", url, "--archive", archive, "--until-caught-up")[0] == 0
    assert left == [(True, [])]


def test_features_are_read_as_of_a_time(double11, dataset, url):
    double11("features", "materialize", dataset)
    user = Dataset.open(dataset).events()["user_id"][0]
    _, early = double11("features", "get", "--user", user, "--as-of", "2025-10-20")
    assert early["as_of"].startswith("2025-10-20T00:00:00")
    assert all(t < "2025-10-20" for t in early["entities"][0]["features"]["recent_time"]["value"] or [])


def test_until_keeps_later_events_out(double11, dataset, url):
    double11("streaming", "init")
    _, some = double11("produce", dataset, "--sink", url, "--until", "2025-11-01")
    events = Dataset.open(dataset).events()
    assert some["events"] >= events.filter(pl.col("event_time") < pl.datetime(2025, 11, 1, time_zone="UTC")).height
    assert some["events"] < len(events)


def test_features_until_a_time_know_nothing_that_was_learnt_later(double11, dataset, url, tmp_path):
    late = pl.datetime(2025, 11, 2, time_zone="UTC", time_unit="us")
    shutil.copytree(dataset, tmp_path / "late")
    first = pl.col("event_id") == pl.col("event_id").first()
    events = Dataset.open(dataset).events().with_columns(known_at=pl.when(first).then(late))
    events.write_parquet(tmp_path / "late" / "events.parquet")
    _, all_known = double11("features", "materialize", dataset, "--until", "2025-11-01")
    _, one_later = double11("features", "materialize", tmp_path / "late", "--until", "2025-11-01")
    assert one_later["events"] == all_known["events"] - 1


def test_a_dataset_of_the_future_names_shift_to(double11, dataset, url):
    double11("streaming", "init")
    code, answer = double11("produce", dataset, "--sink", url, "--shift-to", "2090-01-01")
    assert code == 2
    assert "--shift-to" in answer["error"]["fix"]
    code, answer = double11("produce", dataset, "--sink", url, "--shift-to", "2024-01-01")
    assert code == 0


def test_a_catalogue_that_goes_on_after_the_last_action_is_shifted_with_it(double11, url, tmp_path):
    now = datetime.now(UTC).replace(microsecond=0)
    days, time = [now + timedelta(days=n) for n in (-3, -2, -1, 2)], pl.Datetime("us", "UTC")
    events = pl.DataFrame(
        {"event_id": ["e"], "user_id": ["u"], "item_id": ["a"], "event_type": ["view"], "event_time": days[1:2]}
    ).with_columns(pl.col("event_time").cast(time))
    items = pl.DataFrame({"item_id": ["a", "b"], "available_from": [days[0], days[2]]})
    stock = pl.DataFrame({"event_id": ["s"], "item_id": ["a"], "event_time": days[3:], "kind": ["stock"], "stock": [0]})
    write_dataset(
        tmp_path / "data", events=events, items=items.with_columns(pl.col("available_from").cast(time)), info={},
        catalog=stock.with_columns(pl.col("event_time").cast(time)),
    )  # fmt: skip
    double11("streaming", "init")
    code, answer = double11("produce", tmp_path / "data", "--sink", url)
    assert (code, "--shift-to" in answer["error"]["fix"]) == (2, True)
    with open_log(url) as log:
        assert not any(sum(log.end_offsets(topic).values()) for topic in ("events", "catalog"))
    code, answer = double11("produce", tmp_path / "data", "--sink", url, "--shift-to", now.isoformat())
    assert (code, answer["events"]) == (0, 4)
    with open_log(url) as log:
        found = [decode_events(b.values).batch for topic in ("events", "catalog") for b in read_all(log, topic)]
    times = {i: t for b in found for i, t in zip(b.strings("item_id"), b.numpy("event_time").tolist(), strict=True)}
    assert times["a"] == int(now.timestamp()) * 1_000_000
    assert times["b"] == times["a"] - 3 * 86_400_000_000


def test_a_shift_moves_no_event_before_1970_and_no_listing(double11, url, tmp_path):
    """One item of 2090 stretches the span: with its time moved to now, the events would be of 1960."""
    time, year = pl.Datetime("us", "UTC"), lambda *years: pl.Series([datetime(y, 1, 1, tzinfo=UTC) for y in years])
    events = pl.DataFrame(
        {"event_id": ["e"], "user_id": ["u"], "item_id": ["book"], "event_type": ["view"], "event_time": year(2024)}
    ).with_columns(pl.col("event_time").cast(time))
    items = pl.DataFrame({"item_id": ["book", "wrong"], "available_from": year(1950, 2090).cast(time)})
    write_dataset(tmp_path / "data", events=events, items=items, info={})
    double11("streaming", "init")
    produce = ("produce", tmp_path / "data", "--sink", url, "--shift-to", "2020-01-01")
    code, answer = double11(*produce)
    assert (code, answer["error"]["code"]) == (2, "BAD_INPUT")
    assert all(said in answer["error"]["message"] for said in ("of 2024-01-01", "to 195", "of 2090-01-01"))
    with open_log(url) as log:
        assert not any(sum(log.end_offsets(topic).values()) for topic in ("events", "catalog"))
    code, answer = double11(*produce, "--until", "2024-01-02")
    assert (code, answer["events"]) == (0, 2)
    _, report = double11("ingest", "--source", url, "--store", url, "--until-caught-up")
    assert (report["events"], report["dead_letters"]) == ({"applied": 2}, {})


def test_a_log_that_does_not_exist_names_init(double11, dataset, url):
    code, answer = double11("produce", dataset, "--sink", url)
    assert code == 2
    assert "streaming init" in answer["error"]["fix"]


def test_a_taken_metrics_port_is_named_with_its_setting(double11, url, monkeypatch):
    double11("streaming", "init")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("DOUBLE11__STREAMING__JOB__METRICS_PORT", port)
        code, report = double11("ingest", "--source", url, "--store", url, "--until-caught-up")
    assert (code, report["error"]["code"]) == (4, "UNAVAILABLE")
    assert f"streaming.job.metrics_port {port}" in report["error"]["message"]


def test_forget_reaches_the_store(double11, dataset, url):
    double11("streaming", "init")
    double11("produce", dataset, "--sink", url)
    user = Dataset.open(dataset).events()["user_id"][0]
    assert double11("forget", user)[1]["user"] == user
    double11("ingest", "--source", url, "--store", url, "--until-caught-up")
    _, found = double11("features", "get", "--user", user)
    assert {f["status"] for f in found["entities"][0]["features"].values()} == {"NOT_FOUND"}


def test_dead_letters_are_listed_and_requeued(double11, url):
    double11("streaming", "init")
    with open_log(url) as log:
        producer = log.producer()
        producer.send("events", b"u", b"\xff")
        producer.close()
    double11("ingest", "--source", url, "--store", url, "--until-caught-up")
    (letter,) = double11("dead-letter", "list")[1]["dead_letters"]
    assert (letter["cause"], letter["topic"], letter["bytes"]) == ("undecodable", "events", 1)
    assert double11("dead-letter", "requeue", "--cause", "future")[1]["requeued"] == 0
    assert double11("dead-letter", "requeue")[1]["requeued"] == 1
    assert double11("dead-letter", "requeue")[1] == {
        "requeued": 0, "requeued_earlier": 1, "left_truncated": 0, "by_cause": {},
    }  # fmt: skip
    assert double11("dead-letter", "list")[1]["dead_letters"] == [letter | {"requeued": True}]
    found = double11("dead-letter", "list", "--cause", "future")[1]
    assert (found["dead_letters"], found["waiting"], found["requeued"]) == ([], {}, {"undecodable": 1})
    assert run(["dead-letter", "list"]) == 0
    code, refused = double11("dead-letter", "requeue", "--cause", "futur")
    assert (code, "one of undecodable" in refused["error"]["message"]) == (2, True)


@pytest.mark.parametrize(
    "args",
    [
        ("features", "get"),
        ("features", "get", "--user", "u", "--as-of", "yesterday"),
        ("features", "get", "--user", "u", "--store", "nonsense:x"),
        ("features", "materialize", "nowhere"),
        ("produce", "nowhere", "--sink", "embedded:x"),
        ("ingest", "--source", "kafka://localhost", "--store", "embedded:x"),
        ("ingest", "--source", "embedded:x"),
        ("ingest", "--source", "embedded:x", "--store", "embedded:x", "--offline", "x"),
        ("forget", ""),
        ("forget", "u" * 257),
    ],
)
def test_bad_input_exits_2_with_what_to_do(double11, url, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, answer = double11(*args)
    assert code == 2
    assert answer["error"]["message"]
    assert answer["error"]["fix"]
