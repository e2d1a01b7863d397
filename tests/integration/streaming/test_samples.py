"""The impression join inside the job: samples in the offline store and on the topic, late labels, SIGKILL."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from double11.v1.sample_pb2 import Sample
from samples_world import SECOND, WINDOW, T, action, at_us, joined, slate, traffic

from feature_store.offline.samples import read_samples
from feature_store.online import MemoryStore
from recsys.core import ManualClock
from streaming.archive import Archive
from streaming.config import ArchiveConfig, JobConfig, SamplesConfig, StreamingConfig, Topics
from streaming.job import Job
from streaming.log import open_log
from streaming.log.base import read_all
from streaming.sampler import Sampler

SAMPLES = SamplesConfig(window_s=WINDOW, grace_s=0, slice_s=5, late_s=0.01, rows_max=40)
PARTITIONS = 4


class Shop:
    """A log, a store, an archive and an offline store; event time moves with what is sent."""

    def __init__(self, path: Path, log) -> None:
        self.path, self.log, self.store, self.now_s = path, log, MemoryStore(), 0.0
        self.samples = SAMPLES

    def start(self) -> None:
        self.archive = Archive(self.path / "archive", "test", ArchiveConfig(flush_rows_max=50, tidy_s=0.01))
        follower = Sampler(
            self.archive, self.path / "offline", self.log.producer(), "samples", self.samples,
            clock=ManualClock(T), monotonic_s=lambda: self.now_s,
        )  # fmt: skip
        self.archive.followed_by(follower)
        self.job = Job(self.log, self.store, JobConfig(batch_records_max=64), archive=self.archive)

    def send(self, *sent) -> None:
        producer = self.log.producer()
        for topic, user, message in sent:
            producer.send(topic, user.encode(), message.SerializeToString())
        producer.close()

    def run(self) -> None:
        while self.job.step():
            pass
        self.now_s += 0.1  # late labels are due
        for _ in range(200):
            self.archive.idle()

    def heartbeat(self, at_s: float) -> None:
        """An event on every partition of `events`; those of `impressions` become idle."""
        self.send(*(("events", f"x{i}", action(f"x{i}", "none", at_s)) for i in range(40)))
        self.run()
        self.now_s += 31
        self.run()

    def topic(self) -> list[Sample]:
        return [Sample.FromString(v) for b in read_all(self.log, "samples") for v in b.values]

    def stored(self) -> dict[tuple[str, str], dict]:
        rows = read_samples(self.path / "offline").collect()
        assert rows["sample_id"].n_unique() == len(rows)
        return {(r["request_id"], r["item_id"]): r for r in rows.iter_rows(named=True)}

    def labels(self) -> dict[tuple[str, str], list[int]]:
        if not any((self.path / "offline").glob("samples/day=*/*.parquet")):
            return {}
        return {slot: r["action_types"] for slot, r in self.stored().items()}


@pytest.fixture
def shop(tmp_path):
    with open_log(f"embedded:{tmp_path}") as log:
        log.create_topics(StreamingConfig(partitions=PARTITIONS).partitions_by_topic(Topics()))
        made = Shop(tmp_path, log)
        made.start()
        yield made


def labels(found: dict) -> dict:
    return {slot: (r["action_types"], r["late"]) for slot, r in found.items() if r["action_types"]}


def test_samples_come_when_their_window_is_over(shop):
    shop.send(
        ("impressions", "u", slate("r1", "u", 1)),
        ("events", "u", action("u", "a", 3, 2)),
        ("events", "u", action("u", "a", 59, 5)),
        ("events", "u", action("u", "b", 62, 5)),  # after the window
    )
    shop.heartbeat(62)
    assert not shop.topic()  # the slice ends at 5 s
    shop.heartbeat(66)
    found = shop.stored()
    assert len(found) == 3
    assert labels(found) == {("r1", "a"): ([2, 5], False)}
    assert [(m.item_id, m.position, m.propensity) for m in shop.topic()] == [
        ("a", 1, 1.0), ("b", 2, 0.5), ("c", 3, pytest.approx(1 / 3)),
    ]  # fmt: skip
    assert found["r1", "a"]["action_time_us"] == at_us(3)


def test_late_labels_replace_samples(shop):
    shop.send(("impressions", "u", slate("r1", "u", 1)), ("impressions", "u", slate("r2", "u", 2)))
    shop.heartbeat(80)
    assert labels(shop.stored()) == {}
    shop.send(("events", "u", action("u", "b", 30, 5)), ("events", "u", action("u", "c", 31, 3, "r1")))
    shop.run()
    shop.send(("events", "u", action("u", "b", 32, 4)))
    shop.run()
    found = shop.stored()
    assert labels(found) == {("r2", "b"): ([4, 5], True), ("r1", "c"): ([3], True)}
    last = {m.sample_id: m for m in shop.topic()}
    assert {(m.request_id, m.item_id): list(m.action_types) for m in last.values() if m.action_types} == {
        ("r2", "b"): [4, 5], ("r1", "c"): [3],
    }  # fmt: skip


def test_a_slate_that_comes_late_gets_samples_too(shop):
    shop.send(("impressions", "u", slate("r1", "u", 1)), ("events", "u", action("u", "a", 20, 5)))
    shop.heartbeat(80)
    assert labels(shop.stored()) == {("r1", "a"): ([5], False)}
    shop.send(("impressions", "u", slate("r0", "u", 10)))
    shop.run()
    assert labels(shop.stored()) == {("r0", "a"): ([5], True)}  # the latest slate that showed it
    assert len(shop.stored()) == 6


def test_stress_traffic_gives_no_samples(shop):
    shop.send(("impressions", "u", slate("r1", "u", 1, stress=True)), ("impressions", "u", slate("r2", "u", 1)))
    shop.heartbeat(90)
    assert {r for r, _ in shop.stored()} == {"r2"}


def test_a_clock_that_is_ahead_does_not_close_the_windows_of_others(shop):
    now = time.time() - T / SECOND
    shop.send(("impressions", "u", slate("r1", "u", now - WINDOW + 20)), ("events", "u", action("u", "x", now + 200)))
    shop.heartbeat(now - 8)
    assert not shop.topic()


def test_partitions_that_are_silent_hold_nobody_up_for_long(shop):
    shop.send(("impressions", "u", slate("r1", "u", 1)), ("events", "u", action("u", "z", 100)))
    shop.run()
    assert not shop.topic()
    shop.now_s += 31
    shop.send(("events", "u", action("u", "y", 101)))
    shop.run()
    assert len(shop.topic()) == 3


def test_the_last_windows_close_when_nothing_more_comes(shop):
    shop.send(("impressions", "u", slate("r1", "u", -200)))
    shop.run()
    assert not shop.topic()
    shop.now_s += 31  # the machine's clock is far past the window
    shop.run()
    assert len(shop.topic()) == 3


def test_a_restart_finds_late_labels_that_were_not_joined(shop):
    shop.send(("impressions", "u", slate("r1", "u", 1)))
    shop.heartbeat(80)
    shop.send(("events", "u", action("u", "b", 30, 5)))
    shop.job.step()  # archived and committed, not joined
    shop.start()
    shop.run()
    assert labels(shop.stored()) == {("r1", "b"): ([5], True)}


@pytest.mark.parametrize("seed", [3, 4])
def test_all_slots_have_the_labels_that_a_nested_loop_finds(shop, seed):
    sent = traffic(seed, 700)
    for i in range(0, len(sent), 90):
        shop.send(*sent[i : i + 90])
        shop.run()
    shop.heartbeat(2 * WINDOW + 350)
    expected = joined(sent, 350)
    found = {slot: r["action_types"] for slot, r in shop.stored().items()}
    assert found == expected
    last = {m.sample_id: m for m in shop.topic()}
    assert {(m.request_id, m.item_id): list(m.action_types) for m in last.values()} == expected


WORKER = """
import sys
from pathlib import Path
from feature_store.online import open_store
from streaming.archive import Archive
from streaming.config import ArchiveConfig, JobConfig, SamplesConfig
from streaming.job import Job
from streaming.log import open_log
from streaming.sampler import Sampler

path = Path(sys.argv[1])
with open_log(f"embedded:{path}") as log:
    archive = Archive(path / "archive", "test", ArchiveConfig(flush_rows_max=100, tidy_s=0.05, merged_keep_s=0))
    config = SamplesConfig(window_s=60, grace_s=0, slice_s=5, late_s=0.01, idle_s=1, rows_max=40)
    archive.followed_by(Sampler(archive, path / "offline", log.producer(), "samples", config))
    job = Job(log, open_store(f"embedded:{path}"), JobConfig(batch_records_max=40), archive=archive)
    job.run()
"""


def test_killed_anywhere_no_sample_is_lost(tmp_path):
    sent = traffic(9, 900)
    with open_log(f"embedded:{tmp_path}") as log:
        log.create_topics(StreamingConfig(partitions=PARTITIONS).partitions_by_topic(Topics()))
        shop = Shop(tmp_path, log)
        shop.send(*sent)
        expected, rng = joined(sent, 10_000), random.Random(1)
        for kill in range(7):
            with subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.DEVNULL) as worker:
                end_s = time.monotonic() + (rng.random() * 0.4 + 1.5 if kill < 6 else 240)
                while time.monotonic() < end_s and (kill < 6 or shop.labels() != expected):
                    time.sleep(0.1)
                worker.send_signal(signal.SIGKILL)
        assert shop.labels() == expected
        last = {m.sample_id: m for m in shop.topic()}
        assert {(m.request_id, m.item_id): list(m.action_types) for m in last.values()} == expected
