"""The whole job while its Redis is killed, loads, stops answering: what was lost together is read again, once."""

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest
from redis_world import Forwarder, Server
from streaming_traffic import judged, traffic
from streaming_world import Ingest, Supervised, Trickle, World, check, seeds

EVENTS = 4_000
LET_GO = {0, 1, 4}  # done; another offset than it read (a second was lost); the store is away


@pytest.fixture
def world(redis_server, tmp_path) -> World:
    log = f"embedded:{tmp_path / 'home'}"
    environ = {
        "DOUBLE11__STREAMING__PARTITIONS": "4",
        "DOUBLE11__FEATURE_STORE__REDIS__BUCKETS": "4",
        "DOUBLE11__FEATURE_STORE__REDIS__TIMEOUT_S": "1",
    }
    made = World(log, redis_server.url, environ)
    made.init()
    return made


def killed(server: Server, _: random.Random) -> None:
    server.kill()
    server.start()


def its_machine_died(server: Server, rng: random.Random) -> None:
    """What came after the last sync, less than a second of it, is gone; a write may be torn."""
    before = server.aof.stat().st_size
    time.sleep(0.9)
    after = server.aof.stat().st_size
    server.kill(keep_bytes=rng.randint(before, after))
    server.start()


def killed_and_long_in_loading(server: Server, _: random.Random) -> None:
    """It answers LOADING for two seconds."""
    other_keys(server)
    server.kill()
    server.spawn("--key-load-delay", "2000")
    time.sleep(2)
    loaded(server)


def other_keys(server: Server) -> None:
    """So many that with a --key-load-delay of 2,000 us it loads for 20 s."""
    if not server.client.exists("other-keys"):
        server.client.set("other-keys", "")
        other = server.client.pipeline(transaction=False)
        other.select(9)
        for i in range(10_000):
            other.set(f"other-{i}", "")
        other.execute()
    server.until(lambda: server.client.info("persistence")["aof_pending_bio_fsync"] == 0)
    time.sleep(1.1)  # everysec


def loaded(server: Server) -> None:
    """Loading without any more delay."""
    server.until(lambda: server.client.config_set("key-load-delay", 0))
    server.until(lambda: server.client.ping())


def paused(server: Server, rng: random.Random) -> None:
    """Longer than [feature_store.redis] timeout_s."""
    server.client.client_pause(1_500)
    time.sleep(1.5 + rng.random())


def paused_a_moment(server: Server, rng: random.Random) -> None:
    server.client.client_pause(rng.randint(100, 700))


FAULTS = (killed, its_machine_died, killed_and_long_in_loading, paused, paused_a_moment)


async def disturbed(world: World, server: Server, seed: int, num_events: int, faults: list) -> None:
    sent, rng = traffic(seed, num_events), random.Random(seed)
    expected = judged(sent)
    with Supervised(world, batch_records_max=100) as consumer:
        sender = Trickle(world, sent, 50 * len(faults), 0.1)
        for fault in faults:
            consumer.until_at_work()
            time.sleep(rng.random())
            fault(server, rng)
        sender.hurry()
    print("consumers ended with", consumer.codes)
    assert set(consumer.codes) <= LET_GO, consumer.errors
    world.catch_up()
    await check(world, expected, f"seed {seed}")
    assert world.letters() == expected.causes


@pytest.mark.parametrize("seed", seeds([3]))
async def test_what_redis_lost_is_read_again_once(world, redis_server, seed):
    await disturbed(world, redis_server, seed, EVENTS, list(FAULTS))


def refused(worker: Ingest) -> float:
    """Steps, or tries to start."""
    return worker.metrics().get("double11_steps_refused", Counter()).total()


def until(ready: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + 240
    while not ready():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["gone", pytest.param("loading", marks=pytest.mark.slow)])
async def test_a_worker_that_starts_before_its_store_waits_for_it(world, redis_server, how):
    sent = traffic(8, 600)
    world.send(sent[:300])
    world.catch_up()
    world.send(sent[300:])
    if how == "loading":
        other_keys(redis_server)
    redis_server.kill()
    if how == "loading":
        redis_server.spawn("--key-load-delay", "2000")
    with world.ingest("--until-caught-up") as worker:
        until(lambda: refused(worker), "it has asked")
        if how == "gone":
            redis_server.start()
        else:
            loaded(redis_server)
        worker.report()
    await check(world, judged(sent), how)


async def test_a_store_that_becomes_a_replica_is_left_for_the_new_primary(world, redis_server, tmp_path):
    """A failover as managed servers do it: the name leads elsewhere, and who holds a line gets READONLY."""
    sent, other = traffic(9, EVENTS), Server(tmp_path / "other")
    with closing(other), Forwarder(redis_server.port) as name:
        world = replace(world, store=f"redis://127.0.0.1:{name.port}")
        with world.ingest() as worker:
            world.send(sent[: EVENTS // 2])
            assert worker.until(EVENTS // 8)
            other.client.replicaof("127.0.0.1", redis_server.port)
            other.until(lambda: other.client.info("replication")["master_link_status"] == "up")
            other.client.replicaof("NO", "ONE")
            name.to_port = other.port
            redis_server.client.replicaof("127.0.0.1", other.port)
            world.send(sent[EVENTS // 2 :])
            until(lambda: refused(worker), "the replica refuses")
            world.catch_up()
            assert worker.is_running
            worker.stop()
        await check(world, judged(sent), "a failover")


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("seed", seeds([], fresh=1))
async def test_what_redis_lost_is_read_again_once_however_often(world, redis_server, seed):
    faults = random.Random(seed).choices(FAULTS, k=24)
    await disturbed(world, redis_server, seed, 6 * EVENTS, faults)
