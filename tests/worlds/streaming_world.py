"""The streaming job from outside: `double11` as a process on a log, and what readers must find of `streaming_traffic`.

Everything goes through the command line, a broker's own client and public readers; `oracle` says what is right.
"""

import contextlib
import io
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from oracle import HOUR, MINUTE, Oracle
from prometheus_client.parser import text_string_to_metric_families
from streaming_traffic import FORGOTTEN, ITEMS, USERS, Sender, Sent

from feature_store import FeatureStatus
from feature_store.online import open_reader
from recsys.bench.servers import free_ports
from recsys.cli.main import run
from recsys.core import Deadline
from recsys.core.config import Config

COMMAND = [sys.executable, "-c", "from recsys.cli.main import main; main()", "--log-level", "warning"]


@dataclass
class World:
    """A log and a store, and the environment under which commands use them."""

    log: str
    store: str
    environ: dict[str, str]

    @property
    def config(self) -> Config:
        return Config(environ=self.environ)

    def double11(self, *args: object, code: int = 0) -> dict:
        """Run a command in this process; gives its JSON document."""
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            for name, value in self.environ.items():
                patch.setenv(name, value)
            assert run([*map(str, args), "--json"]) == code, out.getvalue()
        return json.loads(out.getvalue().splitlines()[-1])

    def command(self, *args: object) -> dict:
        """As `double11`, in a process of its own."""
        argv = [*COMMAND, *map(str, args), "--json"]
        done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | self.environ, check=False)
        assert done.returncode == 0, done.stderr[-3_000:]
        return json.loads(done.stdout.splitlines()[-1])

    def init(self) -> None:
        self.double11("streaming", "init", "--log", self.log)

    def send(self, sent: Iterable[Sent]) -> None:
        with Sender(self.log, self.config) as send:
            send(sent)

    def ingest(self, *more: object, name: str = "", **settings: object) -> "Ingest":
        """A process of `double11 ingest`; settings are of [streaming.job], the name is the process's in its group."""
        named = {"DOUBLE11__STREAMING__KAFKA__GROUP_INSTANCE_ID": name} if name else {}
        return Ingest(replace(self, environ=self.environ | named), [str(m) for m in more], settings)

    def catch_up(self, *more: object) -> dict:
        """A process that ingests what is in the log now; gives its report."""
        with self.ingest("--until-caught-up", *more) as process:
            return process.report()

    def letters(self) -> Counter[str]:
        """Dead letters by cause, each once."""
        found = self.double11("dead-letter", "list", "--log", self.log, "--limit", 100_000)["dead_letters"]
        return Counter(m["cause"] for m in found)


class Ingest:
    """`double11 ingest` in a process of its own, with metrics; a context manager that leaves nothing running."""

    def __init__(self, world: World, more: list[str], settings: dict[str, object]) -> None:
        (self.port,) = free_ports(1)
        prefix = "DOUBLE11__STREAMING__JOB__"
        environ = os.environ | world.environ | {f"{prefix}METRICS_PORT": str(self.port)}
        environ |= {f"{prefix}{name.upper()}": str(value) for name, value in settings.items()}
        argv = [*COMMAND, "ingest", "--source", world.log, "--store", world.store, "--json", *more]
        # A pipe that nobody reads stops who writes to it once it is full.
        self._log = tempfile.TemporaryFile("a+")  # noqa: SIM115
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environ)

    def __enter__(self) -> "Ingest":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    def said(self) -> str:
        """The end of its log."""
        self._log.seek(0)
        return self._log.read()[-3_000:]

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def metrics(self) -> dict[str, Counter[str]]:
        """Values by metric and label, {} while the process has no metrics yet; events by outcome and the like."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        found: dict[str, Counter[str]] = {}
        for family in text_string_to_metric_families(text):
            if family.name.startswith("double11_"):
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        labels = "/".join(sample.labels.values())
                        found.setdefault(family.name, Counter())[labels] += sample.value
        return found

    def handled(self) -> int:
        """Events classified so far by this process, dead letters included."""
        found = self.metrics()
        names = ("double11_events", "double11_dead_letters")
        return int(sum(found.get(name, Counter()).total() for name in names))

    def num_partitions(self) -> int:
        """Partitions that it has now, of all topics."""
        return int(self.metrics().get("double11_assigned_partitions", Counter()).total())

    def until(self, number: int, timeout_s: float = 240) -> bool:
        """Wait until that many are handled; False when the process ended before."""
        deadline_s = time.monotonic() + timeout_s
        while self.is_running:
            if self.handled() >= number:
                return True
            assert time.monotonic() < deadline_s, f"{self.handled()} of {number} handled; {self.said()}"
            time.sleep(0.002)
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> dict:
        """SIGTERM, and what it reports."""
        self.process.terminate()
        return self.report()

    def report(self) -> dict:
        """Wait for its end; gives the JSON document."""
        out, _ = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, self.said()
        return json.loads(out.splitlines()[-1])


class Supervised:
    """Consumers that are started again when they end, as a supervisor would; a context manager."""

    def __init__(self, world: World, workers: int = 1, more: Sequence[object] = (), **settings: object) -> None:
        self.codes: list[int] = []  # of consumers that ended by themselves
        self.errors: list[str] = []
        self.running: dict[int, Ingest] = {}
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._keep, args=(n, world, more, settings)) for n in range(workers)]

    def __enter__(self) -> "Supervised":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        for process in list(self.running.values()):
            process.process.terminate()
        for thread in self._threads:
            thread.join()

    def until_at_work(self, timeout_s: float = 240) -> None:
        """Wait until every consumer's present process has partitions to read."""
        deadline_s = time.monotonic() + timeout_s
        while not all(n in self.running and self.running[n].num_partitions() for n in range(len(self._threads))):
            assert time.monotonic() < deadline_s, self.errors
            time.sleep(0.02)

    def _keep(self, number: int, world: World, more: Sequence[object], settings: dict[str, object]) -> None:
        while not self._stopping.is_set():
            with world.ingest(
                *more, name=f"consumer-{number}" if len(self._threads) > 1 else "", **settings
            ) as process:
                self.running[number] = process
                if self._stopping.is_set():
                    process.process.terminate()
                process.process.communicate()
                error = process.said()
            if not self._stopping.is_set():
                self.codes.append(process.process.returncode)
                self.errors.append(error[-500:])
                self._stopping.wait(0.2)


class Trickle:
    """Sends slice after slice with pauses in a thread, until `hurry`."""

    def __init__(self, world: World, sent: Sequence[Sent], num_slices: int, pause_s: float) -> None:
        self._world, self._sent, self._num_slices, self._pause_s = world, sent, num_slices, pause_s
        self._hurry, self._failed = threading.Event(), True
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def hurry(self) -> None:
        """Send the rest at once; everything is in the log on return."""
        self._hurry.set()
        self._thread.join()
        assert not self._failed

    def _run(self) -> None:
        edges = [len(self._sent) * i // self._num_slices for i in range(self._num_slices + 1)]
        with Sender(self._world.log, self._world.config) as send:
            for a, b in itertools.pairwise(edges):
                send(self._sent[a:b])
                self._hurry.wait(self._pause_s)
        self._failed = False


def same(want: float | None, got: float, digits: float = 1e-12) -> bool:
    return math.isnan(got) if want is None else math.isclose(want, got, rel_tol=digits, abs_tol=1e-300)


async def check(world: World, expected: Oracle, hint: object = "") -> None:
    """What readers find is what the oracle says, for every user and item, bound for bound."""
    never, now = Deadline.never(), expected.latest + HOUR + 7 * MINUTE + 1
    reader = open_reader(world.store, world.config)
    assert reader.max_event_time_us() == expected.latest, hint
    names = [f"u{i}" for i in range(USERS + 1)] + [f"s{i}" for i in range(4)] + [f"f{i}" for i in range(FORGOTTEN)]
    for user_id in names:
        user = await reader.user(user_id, now, never)
        where = f"{user_id}, {hint}"
        if not expected.users[user_id].known:
            assert user.status == FeatureStatus.NOT_FOUND, where
            continue
        want = expected.user(user_id, now)
        assert want.keys() == user.values.keys()
        wrong = {n: (v, user.values[n]) for n, v in want.items() if not same(v, user.values[n])}
        assert not wrong, (where, wrong)
        columns = (user.recent_time_us, user.recent_event_type, user.recent_item_key)
        assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected.recent(user_id), where
        columns = (user.pair_first_us, user.pair_last_us, user.pair_last_purchase_us, user.pair_purchase_days)
        numbers = zip(user.pair_count.tolist(), *(c.tolist() for c in columns), strict=True)
        assert dict(zip(user.pair_item_key.tolist(), numbers, strict=True)) == expected.pairs(user_id), where
        levels = zip(user.pair_quantity_level.tolist(), user.pair_last_quantity_level.tolist(), strict=True)
        assert dict(zip(user.pair_item_key.tolist(), levels, strict=True)) == {
            k: pytest.approx(v, abs=1e-5) for k, v in expected.quantity_levels(user_id).items()
        }, where
    items = [f"i{i}" for i in range(ITEMS)]
    found = await reader.items([*items, "nobody's"], now, never)
    assert set(found.status[-1].tolist()) == {FeatureStatus.NOT_FOUND}
    for row, item_id in enumerate(items):
        want, values = expected.item(item_id, now), dict(zip(found.names, found.values[row].tolist(), strict=True))
        assert want.keys() == values.keys()
        wrong = {n: (v, values[n]) for n, v in want.items() if not same(v, values[n], 2e-7)}
        assert not wrong, (item_id, hint, wrong)
    reader.close()


def check_command(world: World, expected: Oracle, user_id: str, item_ids: Sequence[str]) -> None:
    """`double11 features get` says the same, in full precision."""
    now = expected.latest + HOUR + 7 * MINUTE + 1
    at, asked = str(np.datetime64(now, "us")) + "Z", [w for i in item_ids for w in ("--item", i)]
    found = world.double11("features", "get", "--store", world.store, "--user", user_id, *asked, "--as-of", at)
    for entity in found["entities"]:
        want = (expected.user if entity["kind"] == "user" else expected.item)(entity["id"], now)
        for name, value in want.items():
            cell = entity["features"][name]
            assert cell["status"] == ("NULL" if value is None else "PRESENT"), (entity["id"], name)
            assert cell["value"] is None if value is None else math.isclose(value, cell["value"], rel_tol=1e-12)


def seeds(known: Sequence[int], *, fresh: int = 0) -> Sequence[int]:
    """Seeds of a test: known ones, and fresh ones at every run; DOUBLE11_FAULT_SEED alone where it is set.

    A seed that fails is in the name of the test that failed: run it again by that variable, and add it to `known`.
    """
    if given := os.environ.get("DOUBLE11_FAULT_SEED"):
        return [int(given)]
    return [*known, *(random.SystemRandom().randrange(1_000_000) for _ in range(fresh))]
