"""The whole job while its Redis is killed, loads, stops answering: what was lost together is read again, once."""

import random
import time

import pytest
from redis_world import Server
from streaming_world import Supervised, Trickle, World, check, judged, seeds, traffic

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
    """Other keys make it take some two seconds, in which it answers LOADING."""
    other = server.client.pipeline(transaction=False)
    other.select(9)
    for i in range(10_000):
        other.set(f"other-{i}", "")
    other.execute()
    time.sleep(1.1)  # everysec
    server.kill()
    server.start("--key-load-delay", "200")


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


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("seed", seeds([], fresh=1))
async def test_what_redis_lost_is_read_again_once_however_often(world, redis_server, seed):
    faults = random.Random(seed).choices(FAULTS, k=24)
    await disturbed(world, redis_server, seed, 6 * EVENTS, faults)
