"""A small shop, a whole run trained on it, and gateways over it: what the serving tests share.

Fixtures for tests/{integration,fault,e2e}/serving; files are made once per test session.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from feature_store.online.memory import MemoryStore
from recsys.core import RunDirectory
from recsys.data import Dataset

CUT = "2025-11-11T00:00:00Z"  # the sale of the simulated world: trained before, live and replayed after
SMALL_TOML = """
[training]
windows = 2
queries_per_window_max = 60
candidates_max = 100
tower_epochs = 1
tower_examples_max = 2_000
ranker_epochs = 1
threads = 1

[llm_reranker.distill]
hidden_size = 32
num_layers = 1
num_experts = 4
expert_width = 32
teacher_hidden_size = 32
teacher_layers = 1
teacher_expert_width = 64
vocab_size = 600
student_epochs = 1
"""
TOML = """
[feature_store]
clock = "data"

[serving]
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


def toml_of(environ: dict[str, str]) -> str:
    """The [streaming] sections that these environment variables say."""
    found: dict[str, list[str]] = {}
    for name, value in environ.items():
        _, *section, key = name.lower().split("__")
        number = value.isdigit() and section[-1] == "kafka"
        found.setdefault(".".join(section), []).append(f"{key} = {value if number else json.dumps(value)}")
    return "".join(f"\n[{section}]\n" + "\n".join(lines) + "\n" for section, lines in found.items())


def double11(*args: object, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run a `double11` command."""
    command = [sys.executable, "-c", "from recsys.cli.main import main; main()", *map(str, args)]
    environ = {**os.environ, "DOUBLE11_PROGRESS": "0"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environ)


def done(*args: object) -> subprocess.CompletedProcess[str]:
    """Run a `double11` command that must succeed."""
    finished = double11(*args)
    assert finished.returncode == 0, finished.stderr
    return finished


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
        done("data", "simulate", "--preset", "tiny", "--seed", "7", "--out", home / "shop")
    return Dataset.open(home / "shop")


@pytest.fixture(scope="module")
def store(dataset):
    """All of its events, folded."""
    made = MemoryStore()
    for batch in dataset.event_batches():
        made.apply(batch)
    return made


@pytest.fixture(scope="session")
def run(home, dataset):
    """A run with towers, ranker, indexes and a distilled reranker: real files and models, small effort."""
    if not (home / "run").exists():
        config, made = home / "small.toml", home / "making"
        config.write_text(SMALL_TOML)
        done("train", dataset.root, "--out", made, "--until", CUT, "--seed", "1", "--config", config)
        done("distill", dataset.root, "--run", made, "--config", config)
        made.rename(home / "run")
    return RunDirectory.open(home / "run")


@pytest.fixture(scope="session")
def live_home(home, dataset):
    """A folder with the shop's events in the durable log and folded into the feature store. Copy it to write to it."""
    folder = home / "live"
    if not folder.exists():
        url = f"embedded:{folder}"
        done("streaming", "init", "--log", url)
        done("produce", dataset.root, "--sink", url)
        done("ingest", "--source", url, "--store", url, "--until-caught-up")
    return folder


@pytest.fixture(scope="session")
def shoppers(dataset):
    """User ids, most active first."""
    return dataset.events()["user_id"].value_counts(sort=True)["user_id"].to_list()


class Gateway:
    """`double11 serve` as a process."""

    def __init__(self, folder: Path, run: Path, *args: str, toml: str = TOML, log_level: str = "info") -> None:
        self.folder = folder
        config = folder / "double11.toml"
        config.write_text(toml)
        command = [
            sys.executable, "-c", "from recsys.cli.main import main; main()", "--log-level", log_level,
            "serve", "--run", str(run),
            "--store", f"embedded:{folder}", "--listen", "127.0.0.1:0", "--config", str(config), *args,
        ]  # fmt: skip
        self._errors = (folder / "stderr.txt").open("w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)

    def __enter__(self) -> "Gateway":
        return self.wait_ready()

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)

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

    def start(*args: str, run_path: Path | None = None, wait: bool = True, **options: str) -> Gateway:
        folder = tmp_path_factory.mktemp("gateway") / "home"
        shutil.copytree(live_home, folder)
        gateway = Gateway(folder, run_path or run.root, *args, **options)
        started.append(gateway)
        return gateway.wait_ready() if wait else gateway

    yield start
    for gateway in started:
        gateway.__exit__()
