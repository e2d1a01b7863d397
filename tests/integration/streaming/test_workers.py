"""Several `double11 ingest` on one Kafka and one Redis Cluster of three nodes: partitions change hands as they go on.

The state must be what an oracle says that shares no code with streaming or the feature store.
"""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from oracle import Oracle
from redis_world import emptied, redis_cluster, redis_standalone
from streaming_traffic import Sent, judged, traffic
from streaming_world import Trickle, World, check

from recsys.core import EventKind
from recsys.data import Dataset
from streaming.archive import archived

__all__ = ["redis_cluster", "redis_standalone"]
EVENTS, PARTITIONS = 4_000, 6


@pytest.fixture
def world(request, kafka, kafka_config) -> World:
    _, environ = kafka_config("confluent")
    small = {
        "DOUBLE11__STREAMING__PARTITIONS": str(PARTITIONS),
        "DOUBLE11__FEATURE_STORE__REDIS__BUCKETS": str(PARTITIONS),
        "DOUBLE11__STREAMING__JOB__BATCH_RECORDS_MAX": "150",
    }
    made = World(f"kafka://{kafka}", emptied(request, "cluster"), small | environ)
    made.init()
    return made


def until(ready, what: object = "", timeout_s: float = 240) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def partitions(worker) -> Counter[str]:
    """How many it has, by topic."""
    assert worker.is_running, worker.said()
    return worker.metrics().get("double11_assigned_partitions", Counter())


def refused(worker, why: str) -> float:
    """How many steps, or tries to start, have been."""
    return worker.metrics().get("double11_steps_refused", Counter())[why]


async def test_three_workers_one_killed_one_stopped_lose_and_double_nothing(world, tmp_path):
    """They share an archive, too; a store that is rebuilt from it is the oracle's once more."""
    kept = tmp_path / "archive"
    sent = [s for s in traffic(21, EVENTS) if s.event is None or not s.event.get("user", "").startswith("f")]
    sent, rest = sent[: -EVENTS // 8], sent[-EVENTS // 8 :]
    expected = judged(sent)
    with ExitStack() as running:
        first = running.enter_context(world.ingest("--archive", kept))
        world.send(sent[: EVENTS // 4])
        assert first.until(EVENTS // 20)
        second, third = (running.enter_context(world.ingest("--archive", kept)) for _ in range(2))
        workers = [first, second, third]
        until(lambda: all(0 < partitions(w).total() < 2 * PARTITIONS for w in workers), "a share for each")
        until(lambda: sum(partitions(w).total() for w in workers) == 2 * PARTITIONS, "all partitions")
        before = [w.handled() for w in workers]
        trickle = Trickle(world, sent[EVENTS // 4 :], 40, 0.2)
        assert all(w.until(n + 10) for w, n in zip(workers, before, strict=True))
        second.kill()
        until(lambda: partitions(first).total() + partitions(third).total() == 2 * PARTITIONS, "its partitions move")
        assert third.stop()["events"]["applied"] > 0
        trickle.hurry()
        world.catch_up("--archive", kept)
        assert first.is_running
        first.stop()
    await check(world, expected, "three workers")
    assert world.letters() == expected.causes
    check_archive(kept, sent, expected)
    with world.ingest("--archive", kept) as worker:
        report = world.double11("features", "materialize", kept, "--store", world.store, "--log", world.log)
        assert report["events"] == len(list(archive_rows(kept)))
        await check(world, expected, "rebuilt")
        world.send(rest)  # the worker goes on in what serving reads now
        world.catch_up("--archive", kept)
        worker.stop()
    await check(world, judged([*sent, *rest]), "streamed on")
    check_archive(kept, [*sent, *rest], judged([*sent, *rest]))


def archive_rows(root: Path) -> Iterator[dict]:
    return (row for some in archived(root) for row in some.batch.table.to_pylist())


def check_archive(root: Path, sent: list[Sent], expected: Oracle) -> None:
    """Every event that counts is in it once; and all of their items."""
    rows = list(archive_rows(root))
    actions = [(r["event_id"], r["late"]) for r in rows if r["kind"] == EventKind.ACTION]
    assert sorted(actions) == sorted([(i, False) for i in expected.accepted] + [(i, True) for i in expected.late])
    changes = Counter(s.event["id"] for s in sent if s.event is not None and s.topic == "catalog")
    assert Counter(r["event_id"] for r in rows if r["kind"] != EventKind.ACTION) == changes
    listed = {r["item_id"] for r in rows if r["kind"] == EventKind.ACTION or r["listed"]}
    assert set(Dataset.open(root).items()["item_id"]) == listed


async def test_two_workers_that_catch_up_together_leave_everything_applied(world):
    sent = [s for s in traffic(22, EVENTS) if s.event is None or not s.event.get("user", "").startswith("f")]
    world.send(sent)
    with world.ingest("--until-caught-up") as first, world.ingest("--until-caught-up") as second:
        reports = [first.report(), second.report()]
    await check(world, judged(sent), reports)


async def test_workers_on_kafka_python_share_and_hand_over(kafka, kafka_config, request):
    _, environ = kafka_config("kafka-python")
    small = {
        "DOUBLE11__STREAMING__PARTITIONS": "4",
        "DOUBLE11__FEATURE_STORE__REDIS__BUCKETS": "4",
        "DOUBLE11__STREAMING__JOB__BATCH_RECORDS_MAX": "50",
    }
    world = World(f"kafka://{kafka}", emptied(request, "standalone"), small | environ)
    world.init()
    sent = [s for s in traffic(26, 900) if s.event is None or not s.event.get("user", "").startswith("f")]
    with world.ingest() as first, world.ingest() as second:
        until(lambda: all(0 < partitions(w).total() < 8 for w in (first, second)), "a share for each")
        world.send(sent[:400])
        # One may have got all of the events, the other all of the item updates.
        until(lambda: first.handled() + second.handled() >= 50, "they are at work")
        second.stop()
        world.send(sent[400:])
        until(lambda: partitions(first).total() == 8, "all partitions are the first's")
        world.catch_up()
        first.stop()
    expected = judged(sent)
    await check(world, expected, "kafka-python")
    assert world.letters() == expected.causes


async def test_a_node_of_the_cluster_that_loses_what_it_had_not_synced_is_read_again(world, redis_cluster):
    sent = [s for s in traffic(23, EVENTS) if s.event is None or not s.event.get("user", "").startswith("f")]
    with world.ingest() as worker:
        trickle = Trickle(world, sent, 40, 0.1)
        node = redis_cluster.nodes[1]
        aof = next(node.folder.rglob("*.incr.aof"), node.folder / "appendonly.aof")  # of Redis 7, of 6
        assert worker.until(EVENTS // 8)
        node.until(lambda: node.client.info("persistence")["aof_pending_bio_fsync"] == 0)
        size = aof.stat().st_size
        assert worker.until(EVENTS // 4)
        node.kill()
        with aof.open("r+b") as file:  # what fsync had not reached; some seconds, to be sure that it matters
            file.truncate(size)
        node.start()
        trickle.hurry()
        until(lambda: worker.metrics().get("double11_ingest_away_seconds"), "the loss is noticed, and steps go on")
        worker.stop()
    world.catch_up()
    redis_cluster.until_ok()
    await check(world, judged(sent), "a node lost its tail")


async def test_a_cluster_that_is_down_is_waited_for_at_work_and_at_start(world, redis_cluster):
    sent = [s for s in traffic(25, EVENTS) if s.event is None or not s.event.get("user", "").startswith("f")]
    with world.ingest() as worker, ExitStack() as later:
        world.send(sent[: EVENTS // 2])
        assert worker.until(EVENTS // 8)
        with redis_cluster.down():
            starting = later.enter_context(world.ingest("--until-caught-up"))
            until(lambda: refused(worker, "unavailable") and refused(starting, "unavailable"), "both wait")
            world.send(sent[EVENTS // 2 :])
            assert worker.is_running
            assert starting.is_running
        starting.report()
        worker.stop()
    world.catch_up()
    await check(world, judged(sent), "a cluster was down")


async def test_a_worker_that_was_stopped_in_its_step_and_wakes_up_as_a_zombie_is_fenced(world):
    sent = [s for s in traffic(24, EVENTS) if s.event is None or not s.event.get("user", "").startswith("f")]
    with world.ingest() as zombie, world.ingest() as other:
        until(lambda: all(0 < partitions(w).total() < 2 * PARTITIONS for w in (zombie, other)), "a share for each")
        trickle = Trickle(world, sent, 40, 0.1)
        assert zombie.until(EVENTS // 20)
        zombie.process.send_signal(signal.SIGSTOP)
        until(lambda: partitions(other).total() == 2 * PARTITIONS, "its session is over")
        assert other.until(other.handled() + 50)
        zombie.process.send_signal(signal.SIGCONT)
        trickle.hurry()
        until(lambda: 0 < partitions(zombie).total() < 2 * PARTITIONS, "it is a member again")
        world.catch_up()
        zombie.stop()
        other.stop()
    await check(world, judged(sent), "a zombie")
