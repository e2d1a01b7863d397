"""A whole run on a small simulated world: what it holds, that it repeats, and that the future can't reach it."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_store.online.memory import MemoryStore
from llm_reranker.lists import read
from llm_reranker.prompt import item_texts
from recsys.bench.servers import free_ports
from recsys.core import (
    BadInput,
    Conflict,
    CorruptData,
    Deadline,
    ManualClock,
    NotFound,
    Query,
    RunDirectory,
    VersionMismatch,
    keys,
)
from recsys.core.items import ItemTable
from recsys.data import Dataset, simulate
from recsys.evaluation.queries import ANY_POSITIVE
from recsys.models.config import RankerConfig, TowerConfig
from recsys.models.ranker import Ranker
from recsys.models.tower import Tower
from recsys.pipeline import Ports, build
from recsys.training import Settings, TrainingConfig, rerank_lists, train
from recsys.training.base_run import iso
from recsys.training.promote import current_link, current_run, promote
from recsys.training.rank_lists import RankLists

SETTINGS = Settings(
    training=TrainingConfig(
        windows=3,
        queries_per_window_max=40,
        tower_epochs=1,
        tower_examples_max=2_000,
        ranker_epochs=2,
        ranker_steps_min=1,
    ),
    tower=TowerConfig(dim=16, heads=2, history_items_max=10),
    ranker=RankerConfig(dim=4, hidden=8),
)
SAME = ("models/", "index/", "items.parquet")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("world") / "data"
    simulate("tiny", 0, out)
    return Dataset.open(out)


@pytest.fixture(scope="module")
def until_us(world: Dataset) -> int:
    return world.first_event_us + (world.last_event_us - world.first_event_us) * 3 // 4


@pytest.fixture(scope="module")
def run(world: Dataset, until_us: int, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train(world.root, tmp_path_factory.mktemp("runs") / "run", until_us=until_us, settings=SETTINGS)


def _truncated(world: Dataset, until_us: int, out: Path) -> Path:
    """The dataset as it would have been at `until`: later events, listings and changes deleted."""
    shutil.copytree(world.root, out)
    cut = datetime.fromtimestamp(until_us / 1e6, UTC)
    for name, column in (("events", "event_time"), ("items", "available_from"), ("catalog", "event_time")):
        for path in [out / f"{name}.parquet"] if (out / f"{name}.parquet").is_file() else []:
            frame = pl.read_parquet(path)
            frame.filter((pl.col(column) < cut) | pl.col(column).is_null()).write_parquet(path)
    return out


def test_a_run_holds_everything_a_request_needs(run, until_us):
    assert run.until_us == until_us
    assert {"models/tower.safetensors", "models/ranker.json", "index/ann.faiss", "items.parquet"} <= set(
        run.manifest["files"]
    )
    measures = run.manifest["measures"]
    assert len(measures["windows"]) == 3
    assert 0 < measures["validation"]["ndcg@10"] <= 1
    assert 0 < measures["validation"]["new_only_queries"] <= measures["validation"]["queries"]
    assert 0 <= measures["validation"]["new_only_ndcg@10"] <= 1
    heads = Ranker.load(run).heads
    assert [head.foresees for head in heads] == measures["heads"]
    assert all(head.calibration.slope > 0 for head in heads)
    others = measures["heads"][1:]
    assert {"view", "cart"} <= set(others)
    for share, ece in ((f"{b}_share", f"{b}_ece") for b in others):
        assert 0 <= measures["validation"][ece] < measures["validation"][share] < 1, ece
    assert Tower.load(run).dim == 16


def test_lists_say_what_users_did_in_the_window(world, run):
    """All of it, and the label is made of it where nothing has to be new."""
    positives = run.manifest["measures"]["foresees"]
    seen = 0
    for window in run.manifest["measures"]["windows"]:
        from_us, to_us = (int(datetime.fromisoformat(window[end]).timestamp() * 1e6) for end in ("from", "to"))
        (path,) = run.root.with_name("run.work").glob(f"lists-window-{from_us}-{to_us}-*.safetensors")
        lists = RankLists.load(path)
        done = world.events(from_us=from_us, before_us=to_us).select("user_id", "item_id", "event_type").unique()
        truth = dict.fromkeys(zip(done["user_id"], keys(done["item_id"]).tolist(), done["event_type"], strict=True))
        rows = [(lists.user_id[q], k) for q, k in zip(lists.query_of_row(), lists.item_key.tolist(), strict=True)]
        for behaviour in ANY_POSITIVE:
            assert lists.did(behaviour).tolist() == [(*row, behaviour) in truth for row in rows]
            seen += lists.did(behaviour).sum()
        positive = np.any([lists.did(b) for b in positives], axis=0)
        new = lists.new_only[lists.query_of_row()]
        np.testing.assert_array_equal(lists.label[~new], positive[~new])
        assert not (lists.label & ~positive).any()
    assert seen


def test_nothing_from_until_on_changes_a_bit_of_the_run(world, run, until_us, tmp_path):
    short = _truncated(world, until_us, tmp_path / "short")
    again = train(short, tmp_path / "run", until_us=until_us, settings=SETTINGS)
    digest = {n: e["sha256"] for n, e in run.manifest["files"].items() if n.startswith(SAME) and n != "index/ann.json"}
    assert digest == {n: again.manifest["files"][n]["sha256"] for n in digest}
    assert again.manifest["measures"] == run.manifest["measures"]


def test_two_processes_train_the_same_run(world, run, until_us, tmp_path):
    pair = train(world.root, tmp_path / "pair", until_us=until_us, settings=SETTINGS, nproc=2)
    assert pair.manifest["files"]["items.parquet"] == run.manifest["files"]["items.parquet"]
    assert pair.manifest["measures"] == run.manifest["measures"]  # of the windows, which one process makes each
    (item_key, vectors), (same_key, same) = Tower.load(pair).item_vectors(), Tower.load(run).item_vectors()
    np.testing.assert_array_equal(item_key, same_key)
    np.testing.assert_allclose(vectors, same, rtol=0, atol=1e-5)
    assert not list((tmp_path / "pair.work").glob("tower-checkpoint-*"))


@pytest.mark.slow
def test_two_hosts_that_share_a_folder_train_the_same_run(world, run, until_us, tmp_path):
    """The command of docs/operations.md: each torchrun is a host with one process."""
    (port,) = free_ports(1)
    torchrun = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
    ]
    training = ["train", str(world.root), "--out", str(tmp_path / "run"), "--until", iso(until_us)]
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "recsys.cli.main", *training]
    sections = {"TRAINING": SETTINGS.training, "MODELS__TOWER": SETTINGS.tower, "MODELS__RANKER": SETTINGS.ranker}
    settings = {f"DOUBLE11__{s}__{n.upper()}": str(v) for s, c in sections.items() for n, v in asdict(c).items()}
    environ = {**os.environ, **settings, "OMP_NUM_THREADS": "1", "DOUBLE11_PROGRESS": "0"}
    hosts = [subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [host.communicate(timeout=600)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    pair = RunDirectory.open(tmp_path / "run")
    assert pair.manifest["measures"] == run.manifest["measures"]
    np.testing.assert_allclose(Tower.load(pair).item_vectors()[1], Tower.load(run).item_vectors()[1], rtol=0, atol=1e-5)


async def test_the_run_answers_requests(world, run, until_us):
    store = MemoryStore()
    for batch in world.event_batches(before_us=until_us):
        store.apply(batch)
    ports = Ports(features=store, clock=ManualClock(until_us), rng=np.random.default_rng(0))
    cascade = build("rank", run, ports)
    user_id = world.events(before_us=until_us)["user_id"][0]
    slate = await cascade.recommend(Query(user_id=user_id, as_of_us=until_us), Deadline.never())
    assert (slate.tier.label, slate.fallbacks, len(slate.items)) == ("rank", (), 10)


def test_rerank_lists_come_from_the_windows_and_are_labelled(world, run):
    lists = read(rerank_lists.make(world.root, run))
    assert len(np.unique(lists.query_time_us)) == 3
    assert (lists.query_time_us < run.until_us).all()
    assert lists.item_embedding.shape[1] == 16
    assert 0 < lists.label.mean() < 0.5
    items = ItemTable.read(run.path("items.parquet"))
    texts = set(item_texts(items, items.item_key))
    assert set(lists.item_text) <= texts
    assert {line.split(": ", 1)[1] for text in lists.history_text for line in text.splitlines()} <= texts
    assert lists.history_text[0]


def test_lists_of_new_items_are_found_by_requests_for_new_items(world, run):
    """They hold nothing that the user had touched, and other items than those that were left of all."""
    lists = read(rerank_lists.make(world.root, run))
    shown = {
        query_id: set(lists.item_id[start:stop])
        for query_id, start, stop in zip(lists.query_id, lists.offsets, lists.offsets[1:], strict=False)
    }
    acted = (
        world.events().filter(pl.col("event_type") != "impression").with_columns(pl.col("event_time").dt.epoch("us"))
    )
    asked = [query_id for query_id in shown if query_id.endswith("/new-only")]
    assert len(asked) == lists.new_only.sum() > 0
    others = 0
    for query_id in asked:
        both = query_id.removesuffix("/new-only")
        user_id, at_us = both.rsplit("@", 1)
        before = acted.filter((pl.col("user_id") == user_id) & (pl.col("event_time") < int(at_us)))
        assert shown[query_id].isdisjoint(before["item_id"])
        others += len(shown[query_id] - shown.get(both, shown[query_id]))
    assert others


def test_lists_from_another_dataset_are_refused(world, run, until_us, tmp_path):
    other = _truncated(world, until_us, tmp_path / "short")
    info = other / "dataset.json"
    info.write_text(info.read_text().replace(world.hash, "0" * 64))
    with pytest.raises(VersionMismatch, match="trained on"):
        rerank_lists.make(other, run)


def test_times_outside_the_data_and_runs_that_exist_are_refused(world, run, tmp_path):
    for until in (world.first_event_us, world.last_event_us + 400 * 86_400_000_000):
        with pytest.raises(BadInput, match="--until"):
            train(world.root, tmp_path / "x", until_us=until, settings=SETTINGS)
    with pytest.raises(BadInput, match="window"):
        train(world.root, tmp_path / "x", until_us=world.first_event_us + 60_000_000, settings=SETTINGS)
    with pytest.raises(Conflict, match="exists"):
        train(world.root, run.root, settings=SETTINGS)
    assert not list(tmp_path.iterdir())


def test_promote_points_at_a_whole_run_only(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DOUBLE11_HOME", str(tmp_path / "home"))
    with pytest.raises(NotFound, match="double11 promote RUN"):
        current_run()
    promote(run.root)
    assert RunDirectory.open(current_run()).run_id == run.run_id
    broken = tmp_path / "broken"
    shutil.copytree(run.root, broken)
    (broken / "models/ranker.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptData, match="ranker"):
        promote(broken)
    assert current_link().resolve() == run.root.resolve()
