"""Several consumers on Kafka and one Redis: they come, leave and are killed while events flow."""

import random
import signal
import time
from collections import Counter

import pytest
from streaming_traffic import judged, traffic
from streaming_world import Supervised, Trickle, World, check, seeds

EVENTS = 4_000


@pytest.fixture
def world(kafka, redis_server, kafka_config) -> World:
    _, environ = kafka_config("confluent", session_timeout_ms=6_000)
    environ |= {"DOUBLE11__STREAMING__PARTITIONS": "8", "DOUBLE11__FEATURE_STORE__REDIS__BUCKETS": "8"}
    made = World(f"kafka://{kafka}", redis_server.url, environ)
    made.init()
    return made


def rebalances(consumers: Supervised) -> float:
    found = [p.metrics() for p in consumers.running.values()]
    return sum(f.get("double11_rebalances", Counter()).total() for f in found)


async def disturbed(world: World, seed: int, num_events: int, num_faults: int) -> None:
    sent, rng = traffic(seed, num_events), random.Random(seed)
    expected = judged(sent)
    with Supervised(world, 2, batch_records_max=100) as consumers:
        sender = Trickle(world, sent, 50 * num_faults, 0.3)
        for fault in range(num_faults):
            consumers.until_at_work()
            time.sleep(rng.random())
            one = consumers.running[fault % 2].process
            if fault % 2:
                one.kill()  # its name keeps its partitions for the session
            else:
                one.send_signal(signal.SIGTERM)  # it leaves and comes back
            one.wait()
        consumers.until_at_work()
        with world.ingest(name="a-third"):  # comes, and is gone without a word: after the session its partitions move
            sender.hurry()
        counted = rebalances(consumers)
    print("consumers ended with", consumers.codes)
    assert set(consumers.codes) <= {0, 1, -signal.SIGKILL}, consumers.errors
    assert counted > 0
    world.catch_up()
    await check(world, expected, f"seed {seed}")
    assert world.letters() == expected.causes


@pytest.mark.parametrize("seed", seeds([4]))
async def test_consumers_that_come_and_go_lose_and_double_nothing(world, seed):
    await disturbed(world, seed, EVENTS, 2)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("seed", seeds([], fresh=1))
async def test_consumers_that_come_and_go_often_lose_and_double_nothing(world, seed):
    await disturbed(world, seed, 5 * EVENTS, 12)
