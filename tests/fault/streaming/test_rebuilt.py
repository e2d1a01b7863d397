"""A store wiped, left behind by the log, or of an older release: rebuilt from the archive while traffic goes on."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import redis
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from streaming_traffic import judged, traffic
from streaming_world import COMMAND, Supervised, Trickle, World, check

from feature_store.online import open_reader, open_store
from recsys.core import Deadline, Double11Error, VersionMismatch
from streaming.job import Job
from streaming.log import open_log, topics_at
from streaming.log.base import EverythingAssigned

EVENTS = 1_500
# Deleting records needs Apache Kafka; tansu's end of a partition is short of what it has.
KAFKA = ["kafka-redis"] if os.environ.get("DOUBLE11_KAFKA_HOME") else []
NEXT_RELEASE = """
import feature_store.views as views
from feature_store.view import FeatureView, Views, version_of
from feature_store.columns import NewRows
from feature_store.state import Op, Table
import numpy as np

def rows(events):
    at = np.flatnonzero(events.item_code >= 0)
    ones = np.ones(len(at), np.int64)
    return {"touches": NewRows.of(events.item_code[at], np.zeros(len(at), np.int64), ones)}

def values(state, as_of_us):
    table = state["touches"]
    total = np.zeros(len(table.offsets) - 1)
    np.add.at(total, table.owner, table["number"])
    return total[:, None]

TABLE = Table(name="touches", key=("zero",), values=(("number", Op.ADD),))
ADDED = FeatureView(name="touches", version=1, kind="item", tables=(TABLE,), rows=rows, features=("touches",),
                    values=values, times=lambda state: np.zeros((len(state), 1), np.int64))
views.ITEM = Views("item", (*views.ITEM.views, ADDED))
views.ITEM_FEATURE_NAMES = views.ITEM.feature_names
views.VIEW_SET = version_of(views.USER, views.ITEM)
"""


@pytest.fixture(params=["embedded", pytest.param("embedded-redis", marks=pytest.mark.slow if KAFKA else ()), *KAFKA])
def world(request: pytest.FixtureRequest, tmp_path) -> World:
    """A log with topics and an empty store: in one folder, that log with Redis, Apache Kafka with Redis."""
    small = {
        "DOUBLE11__STREAMING__PARTITIONS": "4",
        "DOUBLE11__FEATURE_STORE__REDIS__BUCKETS": "4",
        "DOUBLE11__FEATURE_STORE__REDIS__TIMEOUT_S": "60",
        "DOUBLE11__STREAMING__JOB__BATCH_RECORDS_MAX": "150",
        "DOUBLE11__STREAMING__ARCHIVE__FLUSH_S": "0.5",
    }
    log = store = f"embedded:{tmp_path / 'home'}"
    if request.param != "embedded":
        store = request.getfixturevalue("redis_server").url
    if request.param == "kafka-redis":
        _, environ = request.getfixturevalue("kafka_config")("confluent")
        small |= environ
        log = f"kafka://{request.getfixturevalue('kafka')}"
    made = World(log, store, small)
    made.init()
    return made


def wipe(world: World) -> None:
    """Everything in Redis is gone; an embedded store's folder is."""
    if world.store.startswith("redis:"):
        redis.Redis.from_url(world.store).flushall()
    else:
        shutil.rmtree(world.store.removeprefix("embedded:") + "/store")


class Watch:
    """Reads one user and some items all the time, in a thread of its own."""

    def __init__(self, world: World) -> None:
        self.reads, self.failed = 0, []
        self._stop, self._world = threading.Event(), world
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        reader = open_reader(self._world.store, self._world.config)
        while not self._stop.is_set():
            try:
                await reader.user("u1", 1_700_000_000_000_000, Deadline.after_ms(60_000))
                await reader.items(["i1", "i2"], 1_700_000_000_000_000, Deadline.after_ms(60_000))
                self.reads += 1
            except Double11Error as error:
                self.failed.append(error)
            await asyncio.sleep(0.005)
        await (reader.aclose() if hasattr(reader, "aclose") else asyncio.sleep(0))


async def test_rebuilt_while_traffic_goes_on(world, tmp_path):
    """Twice: with the store as it is, and (on Redis) with the store wiped under load."""
    sent, archive = traffic(31, EVENTS), tmp_path / "archive"
    expected = judged(sent)
    with Supervised(world, more=["--archive", archive]) as workers:
        flow, watch = Trickle(world, sent, 30, 0.1), None
        workers.until_at_work()
        watch = Watch(world)
        for wiped in (False, world.store.startswith("redis:")):
            time.sleep(1)
            if wiped:
                wipe(world)
            world.double11("features", "materialize", archive, "--store", world.store, "--log", world.log)
        flow.hurry()
        watch.stop()
    world.catch_up("--archive", archive)
    await check(world, expected)
    assert watch.reads > 5
    assert not watch.failed
    # And once more from nothing but the archive, with nothing left to read.
    world.double11("features", "materialize", archive, "--store", world.store, "--log", world.log)
    assert world.catch_up("--archive", archive)["records"] == 0
    await check(world, expected)


@pytest.mark.parametrize("world", KAFKA, indirect=True)
async def test_a_store_that_the_log_has_left_behind_is_rebuilt(world, tmp_path):
    sent, archive = traffic(32, EVENTS), tmp_path / "archive"
    world.send(sent[:900])
    world.catch_up("--archive", archive)
    with open_log(world.log, world.config) as log:
        topics = topics_at(world.log, world.config)
        past = (topics.events, topics.impressions, topics.catalog, topics.item_updates)
        ends = {t: log.end_offsets(t) for t in past}
    admin = AdminClient({"bootstrap.servers": world.log.removeprefix("kafka://")})
    gone = [TopicPartition(t, p, o) for t, at in ends.items() if t != topics.catalog for p, o in at.items()]
    for done in admin.delete_records(gone).values():
        done.result()
    wipe(world)
    with world.ingest("--until-caught-up") as process:
        out, _ = process.process.communicate(timeout=240)
    assert process.process.returncode != 0
    assert "features materialize" in out
    world.double11("features", "materialize", archive, "--store", world.store, "--log", world.log)
    world.send(sent[900:])
    world.catch_up("--archive", archive)
    await check(world, judged(sent))


@pytest.mark.parametrize("world", ["embedded-redis"], indirect=True)
def test_a_partition_that_retention_has_emptied_has_no_lag(world, monkeypatch):
    """After a rebuild nothing of item-updates is stored, and quiet partitions bring nothing."""
    topics, said = topics_at(world.log, world.config), {}
    with open_log(world.log, world.config) as log:
        store = open_store(world.store, world.config)
        for which in ("begin_offsets", "end_offsets"):
            there = {t: getattr(log, which)(t) for t in (topics.events, topics.impressions, topics.catalog)}
            monkeypatch.setattr(log, which, (there | {topics.item_updates: dict.fromkeys(range(4), 100)}).get)
        group = EverythingAssigned(4)
        monkeypatch.setattr(group, "commit", said.update)
        monkeypatch.setattr(log, "membership", lambda *_, **__: group)
        job = Job(log, store)
        assert job.run(until_caught_up=True).records == 0
        assert set(job.lag().values()) == {0}
        job.close()
        store.close()
    assert said[topics.item_updates] == dict.fromkeys(range(4), 100)
    assert said[topics.events] == dict.fromkeys(range(4), 0)


async def test_a_view_is_added_while_the_old_ones_are_served(world, tmp_path):
    sent, archive = traffic(33, 600), tmp_path / "archive"
    world.send(sent)
    world.catch_up("--archive", archive)
    watch = Watch(world)
    argv = ["features", "materialize", str(archive), "--store", world.store, "--json"]
    script = f"{NEXT_RELEASE}\nfrom recsys.cli.main import main\nmain()"
    newer = [COMMAND[0], "-c", script, *argv]
    done = subprocess.run(newer, env=os.environ | world.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    time.sleep(2.5)  # readers look again
    watch.stop()
    assert watch.reads
    # The old release served the old namespace until the switch, and says what has happened after it.
    assert all(isinstance(e, VersionMismatch) for e in watch.failed)
    get = ["features", "get", "--store", world.store, "--item", "i1", "--as-of", "2030-01-01", "--json"]
    found = subprocess.run(
        [*newer[:3], *get], env=os.environ | world.environ, capture_output=True, text=True, check=True
    )
    assert '"touches": {"status": "PRESENT"' in found.stdout
    # A rollback is a rebuild too.
    world.double11("features", "materialize", archive, "--store", world.store, "--log", world.log)
    await check(world, judged(sent))
    assert sys.executable == COMMAND[0]
