"""Trainer and worker as real processes over one log, killed at random: no delta is lost, doubled or half applied."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import online_world as world
import pytest
import torch
from double11.v1 import delta_pb2, scoring_pb2, scoring_pb2_grpc

from recsys.candidates.rows import FreshRows
from recsys.core import EventType, Unavailable, WallClock
from recsys.models.delta import DeltaTarget, ModelDelta, encode, target_of
from recsys.models.ranker import Ranker
from recsys.models.tower import Tower
from recsys.serving.deltas import DeltaFollower, RowFollower
from streaming.log import open_log
from streaming.log.base import read_all

TOML = """
[streaming]
partitions = 2
[training.online]
interval_s = 0.3
samples_max = 64
whole_commits = 4
idle_ms = 5
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return world.make_run(tmp_path_factory.mktemp("deltas"))


@pytest.fixture
def home(made, tmp_path):
    """An empty log, and a store with the run's users beside it."""
    url = f"embedded:{tmp_path / 'home'}"
    world.make_log(url)
    (tmp_path / "double11.toml").write_text(TOML)
    command = ["features", "materialize", str(made[1].root), "--store", url]
    assert subprocess.run([*CLI, *command], capture_output=True, timeout=600, check=False).returncode == 0
    return url


CLI = [sys.executable, "-c", "from recsys.cli.main import main; main()"]


class Process:
    """A child whose lines of JSON are kept; `line(key)` waits for the first with a key."""

    def __init__(self, *command):
        environ = {**os.environ, "DOUBLE11_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.popen.stdout:
            with contextlib.suppress(ValueError):
                self.lines.append(json.loads(line))

    def line(self, key, timeout_s=240.0):
        return wait_for(lambda: next((told for told in self.lines if key in told), None), timeout_s)

    def detail(self):
        return next((told["detail"] for told in reversed(self.lines) if "detail" in told), "")

    def kill(self, number=signal.SIGKILL):
        self.popen.send_signal(number)
        return self.popen.wait(240)


def wait_for(found, timeout_s=240.0):
    until = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < until, "too late"
        time.sleep(0.02)
    return value


def trainer(run, home, tmp_path, *more):
    config = ["--config", str(tmp_path / "double11.toml")]
    state = ["--state", str(tmp_path / "state")]
    return Process(*CLI, "train-online", "--run", str(run.root), "--log", home, *state, *config, *more)


def worker(run, home):
    return Process(sys.executable, "-m", "recsys.serving.worker", "--run", str(run.root), "--log", home)


def records(home):
    with open_log(home) as log:
        return [
            delta_pb2.Delta.FromString(value) for batch in read_all(log, world.TOPICS.deltas) for value in batch.values
        ]


def retrieve(port, history):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = scoring_pb2.RetrieveRequest(
            history_keys=history, history_types=[int(EventType.PURCHASE)] * len(history),
            history_times_us=[1_000_000 * i for i in range(len(history))], as_of_us=10**9, limit=20,
        )  # fmt: skip
        return scoring_pb2_grpc.ScoringServiceStub(channel).Retrieve(request, timeout=240)


def test_killed_trainer_and_worker_lose_no_delta_and_double_none(made, home, tmp_path):
    run, dataset = made
    some = list(world.samples(dataset, run, 400, seed=1))
    serving = worker(run, home)
    rng = np.random.default_rng(0)
    for start in (0, 150):
        world.send(home, some[start : start + 150])
        learning = trainer(run, home, tmp_path)
        learning.line("ready")
        time.sleep(float(rng.uniform(0.1, 1.0)))  # somewhere between poll, commit and publication
        learning.kill()
    serving.kill()
    serving = worker(run, home)
    world.send(home, some[300:])
    assert trainer(run, home, tmp_path, "--until-caught-up").popen.wait(240) == 0

    parts = [(d.sequence, d.part) for d in records(home)]
    assert len(set(parts)) == len(parts)
    last = max(sequence for sequence, _ in parts)
    assert sorted({sequence for sequence, _ in parts}) == list(range(1, last + 1))

    port = serving.line("ready")["port"]
    wait_for(lambda: serving.detail() == f"run {run.run_id}, delta {last}")
    tower, ranker = Tower.load(run), Ranker.load(run)
    target = target_of(run.run_id, tower, ranker, lambda t, rows: tower.items.own(rows) if "item" in t else None)
    for delta in records(home):
        target.offer(delta.SerializeToString())
    history = tower.items.vocabulary.keys[:3]
    answer = retrieve(port, history.tolist())
    assert answer.version == f"{Tower.load(run).version}+{last}"
    item_key, vectors = tower.item_vectors()
    user = tower.encode_user(history, np.full(3, EventType.PURCHASE, np.int8), np.arange(3) * 1_000_000, 10**9)
    score = dict(zip(item_key.tolist(), (vectors @ user).tolist(), strict=True))
    np.testing.assert_allclose(answer.scores, [score[k] for k in answer.item_keys], atol=1e-5)
    assert min(answer.scores) >= np.sort(list(score.values()))[-20] - 1e-5
    assert serving.kill(signal.SIGTERM) == 0


def test_deltas_of_another_run_are_left_out_and_a_gap_stops_at_the_last_whole_one(made, home, tmp_path):
    run, dataset = made
    world.send(home, world.samples(dataset, run, 40))
    learning = trainer(run, home, tmp_path)
    wait_for(lambda: records(home))
    learning.kill()
    first = records(home)[0]
    with open_log(home) as log:
        producer = log.producer()
        for changes in ({"run_id": "another"}, {"sequence": 3}):
            other = delta_pb2.Delta()
            other.CopyFrom(first)
            for name, value in changes.items():
                setattr(other, name, value)
            producer.send(world.TOPICS.deltas, other.run_id.encode(), other.SerializeToString())
        producer.close()
    serving = worker(run, home)
    port = serving.line("ready")["port"]
    said = wait_for(lambda: "stopped" in serving.detail() and serving.detail())
    assert said.startswith(f"run {run.run_id}, delta 1")
    assert [told["degraded"] for told in serving.lines if told.get("detail") == said] == [True]
    assert "2, the next one" in said
    assert "snapshot" in said
    assert retrieve(port, [1, 2]).version.endswith("+1")
    serving.kill(signal.SIGTERM)


class Models:
    """As much of a ScoringService as a follower asks for: run r, which is one number."""

    def __init__(self):
        self.models, self.compute = DeltaTarget("r", {}, {"number": torch.zeros(1)}), self

    async def run(self, what, work, deadline):
        return work()

    def take_delta(self, part):
        return self.models.offer(part)

    def reindex(self):
        return 0


async def test_records_that_no_run_wrote_stop_no_worker_and_a_lost_delta_does(tmp_path):
    url = f"embedded:{tmp_path / 'home'}"
    world.make_log(url)

    def delta(sequence):
        number = np.array([sequence], np.float32)
        (part,) = encode(ModelDelta(run_id="r", sequence=sequence, tables={}, dense={"number": number}))
        return part

    worker, told = Models(), []
    with open_log(url) as log:
        producer = log.producer()
        for value in [b"\xff\xff", delta(1), b"\xff\xff", b"", delta(2), delta(3)[:-1], delta(4)]:
            producer.send(world.TOPICS.deltas, b"r", value)
        producer.close()
        follower = DeltaFollower(log, world.TOPICS.deltas, worker, WallClock(), told.append)
        async with asyncio.timeout(60):
            await follower.run()
    assert worker.models.dense["number"].item() == 2
    assert "3, the next one" in told[-1].stopped


async def test_rows_of_indexes_are_taken_in_around_records_that_cannot_be(tmp_path):
    """Garbage, another run and columns that contradict each other cost themselves alone."""
    url = f"embedded:{tmp_path / 'home'}"
    world.make_log(url)

    def delta(sequence, run_id="r", score=1.0, **columns):
        scores, entries = np.array([score], "<f4").tobytes(), np.array([sequence], "<i8").tobytes()
        columns = {"keys": [7], "num_entries": [1], "entry_keys": entries, "scores_f32": scores, **columns}
        rows = delta_pb2.IndexRows(index="swing", **columns)
        made = delta_pb2.Delta(run_id=run_id, sequence=sequence, num_parts=1, samples_until_us=1, index_rows=[rows])
        return made.SerializeToString()

    rows = FreshRows()
    with open_log(url) as log:
        follower = RowFollower(log, world.TOPICS.deltas, "r", rows, WallClock())
        following = asyncio.create_task(follower.run())
        producer = log.producer()
        bad = [
            b"\xff\xff",
            delta(8, run_id="another"),
            delta(9, num_entries=[2]),
            delta(9, scores_f32=b"123"),
            delta(9, score=float("inf")),
        ]
        for value in [delta(1), *bad, delta(2)]:
            producer.send(world.TOPICS.deltas, b"r", value)
        producer.close()
        until = time.monotonic() + 60
        while follower.state.sequence < 2 or follower.state.lag_records:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        following.cancel()
    assert {item: near.tolist() for item, (near, _) in rows.of("swing").items()} == {7: [2]}
    assert follower.status().detail == "run r, delta 2, 1 rows"


async def test_a_follower_whose_log_is_away_says_so_until_it_is_back(tmp_path, monkeypatch):
    url = f"embedded:{tmp_path / 'home'}"
    world.make_log(url)
    monkeypatch.setattr("recsys.serving.deltas._RETRY_S", 0.01)
    with open_log(url) as log:

        def away(topic):
            raise Unavailable("log", came="nothing", expected="an answer", fix="Start it.")

        follower = RowFollower(log, world.TOPICS.deltas, "r", FreshRows(), WallClock())

        async def until(state):
            async with asyncio.timeout(60):
                while follower.status().state != state:
                    await asyncio.sleep(0.01)

        with monkeypatch.context() as patched:
            patched.setattr(log, "end_offsets", away)
            following = asyncio.create_task(follower.run())
            await until("degraded")
            assert "delta 0, not read: log: got nothing" in follower.status().detail
        await until("ok")
        following.cancel()
    assert follower.status().detail == "run r, delta 0, 0 rows"
