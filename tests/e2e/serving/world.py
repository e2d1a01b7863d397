"""A small shop, a whole run trained on it, and gateways over it: what the serving tests share.

Loaded by path from the conftest of tests/{integration,fault,e2e}/serving; files are made once per test session.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from feature_store.online import open_store
from llm_reranker.config import DistillConfig
from llm_reranker.distill import distill
from recsys.core import RunDirectory
from recsys.core.items import ItemTable
from recsys.data import Dataset, simulate
from recsys.models.tower import Tower
from recsys.training import Settings, TrainingConfig, rerank_lists, train
from streaming.job import Job
from streaming.log import open_log
from streaming.produce import produce
from streaming.topics import StreamingConfig, Topics

QUICK = TrainingConfig(
    windows=2, queries_per_window_max=60, candidates_max=100, tower_epochs=1, tower_examples_max=2_000,
    ranker_epochs=1, threads=1,
)  # fmt: skip
SMALL = DistillConfig(
    hidden_size=32, num_layers=1, num_experts=4, expert_width=32, teacher_hidden_size=32, teacher_layers=1,
    teacher_expert_width=64, vocab_size=600, prefix_tokens_max=64, item_tokens_max=12,
    student_epochs=1, teacher_epochs=1,
)  # fmt: skip
TOML = """
[serving]
clock = "data"
start_s_max = 90
drain_s_max = 5
restart_backoff_s_min = 0.2
restart_backoff_s_max = 1.0

[serving.admission]
in_flight_limit = 4

[serving.peak.plans.calm]
tier_best = "retrieval"
in_flight_limit = 2

[serving.peak.plans.midnight]
tier_best = "popular"
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Where the session's files are."""
    made = tmp_path_factory.getbasetemp() / "serving-world"
    made.mkdir(exist_ok=True)
    return made


@pytest.fixture(scope="session")
def dataset(home):
    """A tiny simulated world."""
    if not (home / "shop").exists():
        simulate("tiny", 7, home / "shop")
    return Dataset.open(home / "shop")


@pytest.fixture(scope="session")
def run(home, dataset):
    """A run with towers, ranker, indexes and a distilled reranker: real files and models, small effort."""
    if (home / "run").exists():
        return RunDirectory.open(home / "run")
    made = train(dataset.root, home / "making", seed=1, settings=Settings(training=QUICK))
    distill(
        rerank_lists.make(dataset.root, made),
        ItemTable.read(made.path("items.parquet")),
        home / "reranker",
        config=SMALL,
        item_vectors=Tower.load(made).item_vectors(),
    )
    made.add_files(home / "reranker", "reranker/1", {"rerankers": ["1"]})
    return RunDirectory.open(made.root.rename(home / "run"))


@pytest.fixture(scope="session")
def live_home(home, dataset):
    """A folder with the shop's events in the durable log and folded into the feature store. Copy it to write to it."""
    folder = home / "live"
    if not folder.exists():
        topics, log = Topics(), open_log(f"embedded:{folder}")
        log.create_topics(StreamingConfig().partitions_by_topic(topics))
        produce(dataset.event_batches(), log)
        store = open_store(f"embedded:{folder}")
        job = Job(log, store)
        job.run(until_caught_up=True)
        job.close()
        store.close()
        log.close()
    return folder


@pytest.fixture(scope="session")
def shoppers(dataset):
    """User ids, most active first."""
    return dataset.events()["user_id"].value_counts(sort=True)["user_id"].to_list()


class Gateway:
    """`double11 serve` as a process."""

    def __init__(self, folder: Path, run: Path, *args: str, toml: str = TOML) -> None:
        self.folder = folder
        config = folder / "double11.toml"
        config.write_text(toml)
        command = [
            sys.executable, "-c", "from recsys.cli.main import main; main()", "serve", "--run", str(run),
            "--store", f"embedded:{folder}", "--listen", "127.0.0.1:0", "--config", str(config), *args,
        ]  # fmt: skip
        self._errors = (folder / "stderr.txt").open("w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)

    def wait_ready(self) -> "Gateway":
        line = self.process.stdout.readline()
        assert line, f"did not start: {self.errors()}"
        self.ready = json.loads(line)
        self.target = f"127.0.0.1:{self.ready['port']}"
        return self

    def errors(self) -> str:
        self._errors.flush()
        return (self.folder / "stderr.txt").read_text()

    def child_pid(self, name: str) -> int:
        """Pid of the newest incarnation of a child, from the log."""
        started = [w for w in self.errors().splitlines() if "event=child_started" in w and f"child={name} " in w]
        return int(started[-1].split("pid=")[1].split()[0])

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        self.process.stdout.close()
        self._errors.close()
        return code


@pytest.fixture(scope="session")
def serve(live_home, run, tmp_path_factory):
    """Starts gateways, each over its own copy of the live home; stops what a test leaves behind."""
    started: list[Gateway] = []

    def start(*args: str, run_path: Path | None = None, wait: bool = True, toml: str = TOML) -> Gateway:
        folder = tmp_path_factory.mktemp("gateway") / "home"
        shutil.copytree(live_home, folder)
        gateway = Gateway(folder, run_path or run.root, *args, toml=toml)
        started.append(gateway)
        return gateway.wait_ready() if wait else gateway

    yield start
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.stop(signal.SIGKILL)


def double11(*args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a `double11` command."""
    command = [sys.executable, "-c", "from recsys.cli.main import main; main()", *args]
    environ = {**os.environ, "DOUBLE11_PROGRESS": "0"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environ)
