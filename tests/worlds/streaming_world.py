"""The streaming job from outside: what producers do to a log, `double11` as a process, and what readers must find.

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
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from confluent_kafka import Producer
from double11.v1.event_pb2 import (
    Action,
    Event,
    ForgetUser,
    Impression,
    ImpressionItem,
    ItemChange,
    PriceChange,
    StockChange,
)
from oracle import DAY, HOUR, MINUTE, SECOND, Oracle, oracle
from prometheus_client.parser import text_string_to_metric_families

from feature_store import FeatureStatus
from feature_store.online import open_reader
from recsys.cli.main import run
from recsys.core import Deadline
from recsys.core.config import Config
from streaming.log import Log, open_log, topics_at

T = 1_600_000_000 * SECOND
YEAR_2090 = 3_786_912_000 * SECOND
USERS, ITEMS, FORGOTTEN = 60, 41, 4
COMMAND = [sys.executable, "-c", "from recsys.cli.main import main; main()", "--log-level", "warning"]
VERSION = {"schema": b"1"}
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Sent:
    """One record. topic: the field of [streaming.topics]. event: what the oracle takes; cause: a dead letter's."""

    topic: str
    key: bytes
    value: bytes
    event: dict | None = None
    cause: str = ""
    headers: dict[str, bytes] = field(default_factory=lambda: VERSION)


def record(event: dict) -> Sent:
    """An event as a producer would send it."""
    kind, base = event["kind"], {"event_id": event["id"], "event_time_us": event["time"]}
    base["stress"] = bool(event.get("stress"))
    if kind == "slate":
        shown = [ImpressionItem(item_id=i, position=p, propensity=0.5) for p, i in enumerate(event["items"], 1)]
        slate = Impression(request_id=base.pop("event_id"), user_id=event["user"], items=shown, **base)
        return Sent("impressions", event["user"].encode(), slate.SerializeToString(), event)
    item = event.get("item", "")
    body = {
        "action": lambda: Action(
            type=event["type"],
            user_id=event["user"],
            item_id=item,
            price_minor=event["price"],
            quantity=event.get("quantity"),
        ),
        "price": lambda: PriceChange(item_id=item, price_minor=event["price"]),
        "stock": lambda: StockChange(item_id=item, stock_units=event["stock"]),
        "item": lambda: ItemChange(item_id=item, listed=event["listed"], price_minor=event["price"]),
        "forget": lambda: ForgetUser(user_id=event["user"]),
    }[kind]()
    of_user = kind in ("action", "forget")
    key = event["user"] if of_user else item
    value = Event(**base, **{kind: body}).SerializeToString()
    return Sent("events" if of_user else "catalog", key.encode(), value, event)


def traffic(seed: int, num_events: int) -> list[Sent]:
    """What producers send, in order: disorder, repeats, late ones, clocks days off, slates, changes, forgets, noise.

    How many events of users who ask to be forgotten (f0, f1 ...; ids alike) count as `forgotten` depends on batches.
    """
    rng, sent = random.Random(seed), []
    for i in range(num_events):
        now = T + i * MINUTE
        if rng.random() < 0.02:
            sent.append(noise(rng, i))
            continue
        event = some_event(rng, i, now)
        sent.append(record(event))
        if rng.random() < 0.08:
            again = rng.choice(sent[-50:])
            if again.event is None or again.event["kind"] != "forget":
                sent.append(again)
    return sent


def some_event(rng: random.Random, i: int, now: int) -> dict:
    draw, event = rng.random(), {"id": f"e{i}", "time": now - rng.randint(0, 60 * 60) * SECOND}
    user, item = f"u{min(int(rng.paretovariate(0.7)), USERS)}", f"i{rng.randint(0, ITEMS - 1)}"
    if draw < 0.06:
        price = rng.choice([None, rng.randint(0, 900)])
        said = rng.choice(
            [{"kind": "price", "price": rng.randint(0, 900)}, {"kind": "stock", "stock": rng.randint(0, 9)}]
        )
        said = rng.choice([said, {"kind": "item", "listed": rng.random() < 0.8, "price": price}])
        return event | said | {"item": item}
    if draw < 0.11:
        shown = [f"i{rng.randint(0, ITEMS - 1)}" for _ in range(rng.randint(1, 8))]
        return event | {"kind": "slate", "user": user, "items": shown, "stress": rng.random() < 0.05}
    event |= {"kind": "action", "type": rng.randint(1, 6), "user": user, "item": item, "stress": rng.random() < 0.05}
    event["price"] = rng.choice([None, 0, 100, 250, rng.randint(1, 99_999)])
    event["quantity"] = (None, 1, 6, 12, 2**31 - 1)[i % 5]
    if draw < 0.13:  # whether an item keeps what came just before a user was forgotten is left open
        event |= {"id": f"f{i}", "user": f"f{rng.randint(0, FORGOTTEN - 1)}", "item": "g"}
        if rng.random() < 0.15:
            return {"id": event["id"], "time": event["time"], "kind": "forget", "user": event["user"]}
    elif draw < 0.15:
        event["time"] -= rng.randint(1, 9) * DAY  # late, unless it is the user's first
    elif draw < 0.17:
        event |= {"user": f"s{rng.randint(0, 3)}", "time": now + rng.randint(-5, 5) * DAY}  # a phone with a wrong date
    return event


def noise(rng: random.Random, i: int) -> Sent:
    """A record that is no event of ours."""
    key, at = b"noise-%d" % rng.randint(0, 9), YEAR_2090 + rng.randint(0, DAY)
    good = {"kind": "action", "id": f"n{i}", "time": T, "type": 2, "user": "u1", "item": "i1", "price": None}
    value = record(good).value
    return rng.choice(
        [
            Sent("events", key, b"\x0a\x7f" + rng.randbytes(rng.randint(0, 99)), cause="undecodable"),  # of 127 bytes
            Sent("events", key, value[: -rng.randint(1, 3)], cause="undecodable"),  # truncated inside the action
            Sent("catalog", key, b"\xff\xff", cause="undecodable"),
            Sent("impressions", key, b"\xff\xff", cause="undecodable"),
            Sent("events", key, value, cause="unknown-version", headers={"schema": b"9"}),
            Sent("events", key, record(good | {"type": 0}).value, cause="invalid"),
            Sent("events", key, record(good | {"item": ""}).value, cause="invalid"),
            Sent("events", key, record(good | {"id": "x" * 257}).value, cause="invalid"),
            Sent("events", key, record(good | {"time": at}).value, cause="future"),
            Sent(
                "impressions", key, record(good | {"kind": "slate", "items": ["i1"], "time": at}).value, cause="future"
            ),
        ]
    )


def padded(sent: Sent, num_bytes: int) -> Sent:
    """The same event with a field of a newer schema, so that the value has exactly so many bytes."""
    head = len(sent.value) + 2 + 3  # tag of field 100, length in three bytes
    size = num_bytes - head
    length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    value = sent.value + b"\xa2\x06" + length + bytes(size)
    assert len(value) == num_bytes
    cause = "" if num_bytes <= MEBIBYTE else "too-large"
    return Sent(sent.topic, sent.key, value, None if cause else sent.event, cause)


def judged(sent: Iterable[Sent]) -> Oracle:
    """The oracle's view of what was sent."""
    sent = list(sent)
    found = oracle(s.event for s in sent if s.event is not None)
    found.causes.update(s.cause for s in sent if s.cause)
    return found


class Sender:
    """Appends records, to Kafka with a client of its own; a context manager."""

    def __init__(self, url: str, config: Config) -> None:
        self._topics = topics_at(url, config)
        self._failed: list[object] = []
        if url.startswith("embedded:"):
            self._log: Log | None = open_log(url, config)
            self._writer = self._log.producer()
            return
        self._log = None
        self._producer = Producer(
            {
                "bootstrap.servers": url.removeprefix("kafka://"),
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "message.max.bytes": 2 * MEBIBYTE,
                "on_delivery": lambda error, _: self._failed.append(error) if error else None,
                "log_level": 0,
            }
        )

    def __call__(self, sent: Iterable[Sent]) -> None:
        """Durable on return."""
        for s in sent:
            topic = getattr(self._topics, s.topic)
            if self._log is not None:
                self._writer.send(topic, s.key, s.value, s.headers)
            else:
                self._producer.produce(topic, s.value, s.key, headers=list(s.headers.items()))
                self._producer.poll(0)
        if self._log is not None:
            self._writer.flush()
        else:
            assert self._producer.flush(240) == 0
            assert not self._failed

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._log is not None:
            self._log.close()


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
        from kafka_broker import free_ports  # the suite's conftest makes it importable, after this module

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
