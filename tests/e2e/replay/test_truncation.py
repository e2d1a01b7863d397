"""The truncation test of the replay protocol: delete the future, train and distil again, get the same slates.

Of the past only what was known in time is kept.
"""

import asyncio
import json
from pathlib import Path

import polars as pl
import pytest

from recsys.cli.main import run as double11
from recsys.core import RunDirectory
from recsys.data import Dataset, simulate
from recsys.data.schema import TIME
from recsys.data.simulate import SALE_US
from recsys.evaluation import make_queries
from recsys.replay import recompute, replay
from recsys.replay.compare import answer, iso
from recsys.replay.protocol import Past

ARMS = ("popular", "own_history", "retrieval", "rank", "full")
SMALL = """
[training]
windows = 2
queries_per_window_max = 40
tower_epochs = 1
tower_examples_max = 2000
ranker_epochs = 1
[models.tower]
dim = 16
heads = 2
[models.ranker]
dim = 4
hidden = 8
[llm_reranker.distill]
hidden_size = 32
num_layers = 1
num_experts = 2
expert_width = 32
teacher_hidden_size = 32
teacher_layers = 1
teacher_expert_width = 32
train_queries_max = 30
validation_queries_max = 20
student_epochs = 1
"""


def make_run(data: Path, folder: Path) -> RunDirectory:
    """By the commands, with the same seed."""
    config = folder / "double11.toml"
    config.write_text(SMALL)
    out = folder / "run"
    train = ["train", str(data), "--out", str(out), "--until", iso(SALE_US), "--seed", "3", "--config", str(config)]
    assert double11(train) == 0
    assert double11(["distill", str(data), "--run", str(out), "--seed", "3", "--config", str(config)]) == 0
    return RunDirectory.open(out)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A sale, told twice: as carts of three days earlier, which nobody learns of before midnight."""
    out = tmp_path_factory.mktemp("world") / "data"
    simulate("tiny", 5, out)
    events, sale = pl.read_parquet(out / "events.parquet"), pl.lit(SALE_US).cast(TIME)
    carts = events.filter(pl.col("event_time") >= sale - pl.duration(days=6)).with_columns(
        event_id=pl.format("late-{}", "event_id"),
        event_type=pl.lit("cart"),
        event_time=pl.col("event_time") - pl.duration(days=3),
        known_at=sale,
    )
    both = pl.concat([events, carts.filter(pl.col("event_time") < sale)], how="diagonal")
    both.sort("event_time", maintain_order=True).write_parquet(out / "events.parquet")
    return out


@pytest.fixture(scope="module")
def past_world(world, tmp_path_factory) -> Path:
    """The world without the sale: no event, nothing learnt, no item and no catalogue change from midnight on."""
    out = tmp_path_factory.mktemp("past") / "data"
    out.mkdir()
    for name, column in (("events", "event_time"), ("items", "available_from"), ("catalog", "event_time")):
        frame = pl.read_parquet(world / f"{name}.parquet")
        kept = frame.filter((pl.col(column).dt.epoch("us") < SALE_US) | pl.col(column).is_null())
        if "known_at" in kept.columns:
            kept = kept.filter((pl.col("known_at").dt.epoch("us") < SALE_US) | pl.col("known_at").is_null())
        assert 0 < len(kept) < len(frame)
        kept.write_parquet(out / f"{name}.parquet")
    info = json.loads((world / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({key: value for key, value in info.items() if key != "hash"}))
    return out


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> RunDirectory:
    return make_run(world, tmp_path_factory.mktemp("whole"))


def test_without_the_future_every_arm_says_the_same(world, past_world, whole, tmp_path):
    truncated = make_run(past_world, tmp_path)
    dataset = Dataset.open(world)
    queries = make_queries(
        dataset.events(), from_us=SALE_US, to_us=dataset.last_event_us + 1, positives=["purchase"], queries_max=60
    )
    slates = []
    for data, run in ((world, whole), (past_world, truncated)):
        past = Past(Dataset.open(data).event_batches(before_us=SALE_US))
        answers = asyncio.run(answer(run, ARMS, queries, past, k=50, task="all", seed=0))
        assert {name: said.fallbacks for name, said in answers.items()} == dict.fromkeys(ARMS, 0)
        slates.append(pl.concat([frame for said in answers.values() for frame in said.slates]))
    assert len(slates[0]) > 100
    assert slates[0].equals(slates[1])


def test_the_sale_is_replayed_with_every_arm(world, whole, tmp_path):
    report = replay(world, whole, tmp_path / "report", arms=ARMS, queries_max=60)
    assert list(report["arms"]) == list(ARMS)
    assert set(report["pairs"]) == {f"full-{arm}" for arm in ARMS[:-1]}
    again = recompute(tmp_path / "report")
    for name, figures in again["arms"].items():
        assert figures == {key: report["arms"][name][key] for key in figures}
