"""A Redis store after crashes: bit-equal to a MemoryStore that folded the same log without any."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from feature_store.online import Commit, MemoryStore, OffsetStep, Update, open_reader, open_store
from recsys.core import Conflict, Deadline, DeadlineExceeded, EventBatch, EventKind, Unavailable
from streaming.archive import Archive
from streaming.config import JobConfig, StreamingConfig, Topics
from streaming.item_updates import encode_updates
from streaming.job import Job
from streaming.log import Log, open_log
from streaming.produce import produce

T, MINUTE, DAY = 1_600_000_000_000_000, 60_000_000, 86_400_000_000
EVENTS = 3_000
USERS, ITEMS = [f"u{i}" for i in range(60)], [f"i{i}" for i in range(41)]
both = pytest.mark.parametrize("redis_url", ["standalone", "cluster"], indirect=True)
BOUNDS = JobConfig(batch_records_max=150)


def traffic(seed: int) -> EventBatch:
    """Actions and prices; repeats, late ones and marked ones among them.

    Nobody asks to be forgotten: whether an item counts what came just before depends on how records are batched.
    """
    rng, sent = random.Random(seed), []
    for i in range(EVENTS):
        kind = EventKind.ACTION if rng.random() < 0.9 else EventKind.PRICE
        late_us = 2 * DAY if rng.random() < 0.02 else rng.randint(0, 60) * MINUTE
        sent.append(
            {
                "event_id": f"e{i}",
                "kind": int(kind),
                "event_type": rng.randint(1, 6) if kind == EventKind.ACTION else 0,
                "event_time": T + i * MINUTE - late_us,
                "user_id": None if kind == EventKind.PRICE else rng.choice(USERS[: 1 + i % len(USERS)]),
                "item_id": rng.choice(ITEMS),
                "price": rng.randint(1, 500) if kind == EventKind.PRICE else None,
                "stress": kind == EventKind.ACTION and rng.random() < 0.1,
            }
        )
        if rng.random() < 0.1:
            sent.append(rng.choice(sent[-50:]))
    return EventBatch.from_columns({name: [e[name] for e in sent] for name in sent[0]})


@pytest.fixture
def log(tmp_path):
    with open_log(f"embedded:{tmp_path}") as opened:
        opened.create_topics(StreamingConfig().partitions_by_topic(Topics()))
        produce([traffic(5)], opened)
        yield opened


def ingest(log: Log, store, archive: Path) -> None:
    kept = Archive(archive, "test")
    job = Job(log, store, BOUNDS, archive=kept)
    job.run(until_caught_up=True)
    job.close()
    kept.flush()


def contents(store) -> dict:
    return {
        (kind, shadow): store.load(kind, ids, shadow=shadow)
        for kind, ids in {"user": USERS, "seen": USERS, "shown": USERS, "item": ITEMS}.items()
        for shadow in (False, True)
    }


def archived(folder: Path) -> list[tuple]:
    columns = ["event_id", "event_time", "late"]
    events = pl.read_parquet(folder / "events/day=*/*.parquet", hive_partitioning=False, columns=columns)
    catalog = pl.read_parquet(folder / "catalog/day=*/*.parquet", hive_partitioning=False, columns=columns[:2])
    return sorted(events.rows()) + sorted(catalog.rows())


def same_as_undisturbed(log: Log, url: str, archive: Path, tmp_path: Path) -> None:
    memory = MemoryStore()
    ingest(log, memory, tmp_path / "undisturbed")
    store = open_store(url)
    for topic in ("events", "catalog", "impressions"):
        assert store.offsets(topic) == {p: o for p, o in memory.offsets(topic).items() if o}
    assert contents(store) == contents(memory)
    assert store.max_event_time_us() == memory.max_event_time_us()
    assert archived(archive) == archived(tmp_path / "undisturbed")
    store.close()


class Crash(Exception):
    """The writer is gone."""


class OneByOne:
    """A pipeline that sends each call by itself, and dies after some writes."""

    def __init__(self, client, left: list[int], die) -> None:
        self.client, self.calls, self.left, self.die = client, [], left, die

    def execute_command(self, *call):
        self.calls.append(call)

    def execute(self):
        answers = []
        for call in self.calls:
            if call[0] == "EVAL":
                if not self.left[0]:
                    self.die()
                self.left[0] -= 1
            answers.append(self.client.execute_command(*call))
        return answers


def dying_after(store, writes: int, die) -> None:
    left = [writes]
    store._client.pipeline = lambda transaction=False: OneByOne(store._client, left, die)


@both
def test_a_writer_that_dies_between_buckets_loses_and_doubles_nothing(redis_url, log, tmp_path):
    rng, crashes = random.Random(1), 0

    def die():
        raise Crash

    while True:
        store = open_store(redis_url)
        dying_after(store, rng.randint(0, 60), die)
        try:
            ingest(log, store, tmp_path / "archive")
            break
        except Crash:
            crashes += 1
    assert crashes >= 6
    same_as_undisturbed(log, redis_url, tmp_path / "archive", tmp_path)


class Lossy:
    """A log whose producers fail to flush now and then: of what was sent since the last flush some has landed, some
    never will, and some does later, as with a record that timed out here and was written there.
    """

    def __init__(self, log: Log, seed: int, share: float) -> None:
        self._log, self.rng, self.share, self.failures = log, random.Random(seed), share, 0
        self.late: list[tuple] = []

    def __getattr__(self, name: str):
        return getattr(self._log, name)

    def producer(self) -> "LossyProducer":
        return LossyProducer(self, self._log.producer())


class LossyProducer:
    def __init__(self, lossy: Lossy, real) -> None:
        self._lossy, self._real, self._sent = lossy, real, []

    def send(self, *record) -> None:
        self._sent.append(record)

    def flush(self) -> None:
        lossy, sent = self._lossy, self._sent
        self._sent, failed = [], bool(sent) and lossy.rng.random() < lossy.share
        fate = [lossy.rng.choice(("landed", "late", "never")) if failed else "landed" for _ in sent]
        if lossy.late and lossy.rng.random() < 0.5:
            self._write([lossy.late.pop(0)])
        self._write([r for r, f in zip(sent, fate, strict=True) if f == "landed"])
        lossy.late += [r for r, f in zip(sent, fate, strict=True) if f == "late"]
        if failed:
            lossy.failures += 1
            raise Unavailable("the log", came="no answer", expected="one", fix="Wait.")

    def _write(self, records) -> None:
        for record in records:
            self._real.send(*record)
        self._real.flush()

    def abandon(self) -> None:
        self._real.abandon()


@pytest.mark.parametrize("redis_url", ["standalone"], indirect=True)
@pytest.mark.parametrize("seed", [1, 2])
def test_flushes_that_fail_between_rounds_of_item_updates_lose_and_double_nothing(
    redis_url, log, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr("streaming.stages.encode_updates", partial(encode_updates, bytes_max=600))
    store, lossy, archive = open_store(redis_url), Lossy(log, seed, 0.1), Archive(tmp_path / "archive", "test")
    job = Job(lossy, store, JobConfig(batch_records_max=150, retry_ms=1, retry_ms_max=1), archive=archive)
    job.run(until_caught_up=True)
    job.close()
    archive.flush()
    store.close()
    assert lossy.failures > 5
    same_as_undisturbed(log, redis_url, tmp_path / "archive", tmp_path)


WORKER = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
from pathlib import Path
import test_redis
from feature_store.online import open_store
from streaming.log import open_log

store = open_store(sys.argv[1])
test_redis.dying_after(store, int(sys.argv[5]), lambda: os.kill(os.getpid(), signal.SIGKILL))
with open_log(sys.argv[2]) as log:
    test_redis.ingest(log, store, Path(sys.argv[3]))
"""


@pytest.mark.parametrize("redis_url", ["standalone"], indirect=True)
def test_a_process_killed_between_buckets_goes_on_where_it_was(redis_url, log, tmp_path):
    for writes in (11, 70, 10_000):
        argv = [redis_url, f"embedded:{tmp_path}", str(tmp_path / "archive"), str(Path(__file__).parent), str(writes)]
        done = subprocess.run([sys.executable, "-c", WORKER, *argv], env=os.environ, timeout=240, check=False)
        assert done.returncode == (0 if writes == 10_000 else -signal.SIGKILL)
    same_as_undisturbed(log, redis_url, tmp_path / "archive", tmp_path)


def test_a_redis_killed_and_restarted_is_replayed_from_what_it_kept(redis_server, log, tmp_path):
    kills, url = [4, 9, 15], redis_server.url
    steps = 0
    while True:
        store, kept = open_store(url), Archive(tmp_path / "archive", "test")
        job = Job(log, store, BOUNDS, archive=kept)
        try:
            while job.step():
                steps += 1
                if kills and steps >= kills[0]:
                    kills.pop(0)
                    redis_server.kill()
                    redis_server.start()  # the writer is not told: it has its connection's error, or a Conflict
            kept.flush()
            break
        except (Conflict, Unavailable):
            continue
        finally:
            job.close()
            store.close()
    assert not kills
    same_as_undisturbed(log, url, tmp_path / "archive", tmp_path)


def test_a_redis_that_lost_its_last_writes_refuses_the_next_step(redis_server):
    store = open_store(redis_server.url)
    store.commit(Commit(updates=[Update("user", ["a"], [b"1"])], offsets=[OffsetStep("events", 0, 0, 5)]))
    size = synced(redis_server)
    store.commit(Commit(updates=[Update("user", ["a"], [b"2"])], offsets=[OffsetStep("events", 0, 5, 9)]))
    redis_server.kill(keep_bytes=size)
    redis_server.start()
    with pytest.raises(Conflict, match="from 5, which is stored"):
        store.commit(Commit(updates=[Update("user", ["a"], [b"3"])], offsets=[OffsetStep("events", 0, 9, 12)]))
    assert store.offsets("events") == {0: 5}
    assert store.load("user", ["a"]) == [b"1"]
    store.close()


def test_a_transaction_torn_in_the_aof_is_not_half_applied_by_the_start_after_the_next(redis_server):
    """A start drops it, but cuts the file behind its last whole command: the next start would find what came later
    behind the MULTI, and apply all of it.
    """
    first = Commit(
        updates=[Update("user", USERS, [b"1"] * 60)], offsets=[OffsetStep("events", b, 0, 5) for b in (0, 1)]
    )
    torn = Commit(updates=[Update("user", USERS, [b"2"] * 60)], offsets=[OffsetStep("events", b, 5, 9) for b in (0, 1)])
    store = open_store(redis_server.url)
    store.commit(first)
    size = synced(redis_server)
    store.commit(torn)
    synced(redis_server)
    tail = redis_server.aof.read_bytes()[size:]
    redis_server.kill(keep_bytes=size + tail.index(b"$1\r\n2\r\n") + 3)  # in the first blob, behind the offsets
    redis_server.start()
    with pytest.raises((Conflict, Unavailable)):
        store.commit(Commit(updates=[Update("user", ["a"], [b"3"])]))
    store.commit(Commit(updates=[Update("user", ["a"], [b"3"])]))
    assert store.offsets("events") == {0: 5, 1: 5}
    synced(redis_server)
    redis_server.kill()
    redis_server.start()
    assert store.offsets("events") == {0: 5, 1: 5}
    assert store.load("user", ["a", *USERS]) == [b"3", *[b"1"] * 60]
    store.close()


def synced(server) -> int:
    """Bytes of the AOF once all of it is on disk."""
    sizes = [-1]

    def stands() -> bool:
        sizes.append(server.aof.stat().st_size)
        return sizes[-1] == sizes[-2] and server.client.info("persistence")["aof_pending_bio_fsync"] == 0

    server.until(stands)
    return sizes[-1]


@both
def test_a_writer_that_was_overtaken_is_refused_and_changes_nothing(redis_url):
    stale, other = open_store(redis_url), open_store(redis_url)
    first = Commit(updates=[Update("user", USERS, [b"1"] * 60)], offsets=[OffsetStep("events", 0, 0, 5)])
    assert stale.load("user", USERS) == [b""] * 60
    other.commit(first)
    late = Commit(updates=[Update("user", USERS, [b"2"] * 60)], offsets=[OffsetStep("events", 0, 0, 7)])
    with pytest.raises(Conflict, match=r"events, partition 0.*from 5"):
        stale.commit(late)
    assert other.load("user", USERS) == [b"1"] * 60
    assert stale.offsets("events") == {0: 5}
    other.close()
    stale.close()


@both
def test_a_writer_whose_step_is_of_other_offsets_than_those_that_moved_is_refused_too(redis_url):
    stale, other = open_store(redis_url), open_store(redis_url)
    assert stale.load("item", ["i"]) == [b""]
    other.commit(Commit(updates=[Update("item", ["i"], [b"1"])]))
    with pytest.raises(Conflict, match="item side of bucket"):
        stale.commit(Commit(updates=[Update("item", ["i"], [b"2"])]))
    assert other.load("item", ["i"]) == [b"1"]
    stale.commit(Commit(updates=[Update("item", ["i"], [b"12"])]))
    other.close()
    stale.close()


@pytest.mark.parametrize("redis_url", ["cluster"], indirect=True)
def test_slots_that_move_while_a_writer_writes(redis_url, redis_cluster, log, tmp_path):
    first = open_store(redis_url)
    tags = [f"{{d11:{first.meta().live}:{bucket}}}" for bucket in (0, 5, 7)]
    first.close()
    moved, refused = threading.Event(), 0

    def move() -> None:
        for tag in tags:
            redis_cluster.move_slot(redis_cluster.client.keyslot(tag))
            time.sleep(0.2)
        moved.set()

    mover = threading.Thread(target=move)
    mover.start()
    while True:
        store = open_store(redis_url)
        try:
            ingest(log, store, tmp_path / "archive")
        except (Conflict, Unavailable):
            refused += 1
            assert refused < 100
            continue
        finally:
            store.close()
        if moved.is_set():
            break
        produce([traffic(6)], log)  # there is always something to write until the last slot is where it goes
    mover.join()
    same_as_undisturbed(log, redis_url, tmp_path / "archive", tmp_path)


async def test_a_paused_redis_costs_a_read_its_deadline_and_no_more(redis_server):
    reader = open_reader(redis_server.url)
    assert (await reader.user("u", T, Deadline.after_ms(60_000))).user_id == "u"
    redis_server.client.client_pause(2_000)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await reader.user("u", T, Deadline.after_ms(50))
    assert time.monotonic() - started < 1.9  # it did not wait for the end of the pause
    assert (await reader.user("u", T, Deadline.after_ms(60_000))).user_id == "u"
    redis_server.kill()
    with pytest.raises(Unavailable):
        await reader.user("u", T, Deadline.after_ms(60_000))
    redis_server.start()
    assert (await reader.user("u", T, Deadline.after_ms(60_000))).user_id == "u"
    await reader.aclose()
