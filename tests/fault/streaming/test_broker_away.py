"""The whole job, Kafka to Redis, while the broker dies, is away, and others leave transactions in the topics."""

import random
import time
from collections.abc import Callable

import pytest
from confluent_kafka import IsolationLevel, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from streaming_traffic import T, judged, record, traffic
from streaming_world import Supervised, Trickle, World, check, seeds

EVENTS = 4_000
AWAY_S = 10
GIVEN_UP_S = 240  # of a loaded machine


@pytest.fixture
def world(mortal_kafka, redis_server, kafka_config: Callable) -> World:
    # A loaded machine takes long to start a broker again.
    _, environ = kafka_config("confluent", request_timeout_ms=60_000, delivery_timeout_ms=240_000)
    environ |= {"DOUBLE11__STREAMING__PARTITIONS": "4", "DOUBLE11__FEATURE_STORE__REDIS__BUCKETS": "4"}
    made = World(f"kafka://{mortal_kafka.address}", redis_server.url, environ)
    made.init()
    return made


def killed(broker, world: World, rng: random.Random) -> None:
    broker.kill()
    broker.start()


def away(broker, world: World, rng: random.Random) -> None:
    broker.kill()
    time.sleep(AWAY_S)
    broker.start()


def frozen(broker, world: World, rng: random.Random) -> None:
    """It takes connections and says nothing, as a host that swaps or a network that drops."""
    with broker.frozen():
        time.sleep(2 + 3 * rng.random())


def others_transactions(broker, world: World, rng: random.Random) -> None:
    """One aborted, one left open until the broker times it out, both with valid events that must not count."""
    name, topic = f"other-{rng.random()}", world.environ["DOUBLE11__STREAMING__TOPICS__EVENTS"]
    for end, timeout_ms in (("aborted", 60_000), ("dangling", 3_000)):
        settings = {"transactional.id": f"{name}-{end}", "transaction.timeout.ms": timeout_ms}
        other = Producer({"bootstrap.servers": broker.address, **settings})
        other.init_transactions(GIVEN_UP_S)
        other.begin_transaction()
        for i in range(20):
            event = {"kind": "action", "id": f"{name}-{end}-{i}", "time": T, "type": 5, "item": "i1", "price": 1}
            sent = record(event | {"user": f"u{i}"})
            other.produce(topic, sent.value, sent.key, partition=i % 4, headers=list(sent.headers.items()))
        other.flush()
        if end == "aborted":
            other.abort_transaction(GIVEN_UP_S)
    # What is stable stands still until the broker gives the open one up, and no longer.
    until_s, admin = time.monotonic() + GIVEN_UP_S, AdminClient({"bootstrap.servers": broker.address})
    while stable(admin, topic, IsolationLevel.READ_COMMITTED) < stable(admin, topic, IsolationLevel.READ_UNCOMMITTED):
        assert time.monotonic() < until_s
        time.sleep(0.2)


def stable(admin: AdminClient, topic: str, level: IsolationLevel) -> int:
    """Sum of the partitions' end offsets."""
    asked = {TopicPartition(topic, p): OffsetSpec.latest() for p in range(4)}
    return sum(f.result().offset for f in admin.list_offsets(asked, isolation_level=level).values())


FAULTS = (killed, others_transactions, away, frozen)


async def disturbed(world: World, broker, seed: int, num_events: int, faults: list) -> None:
    sent, rng = traffic(seed, num_events), random.Random(seed)
    expected = judged(sent)
    with Supervised(world, batch_records_max=100) as consumer:
        sender = Trickle(world, sent, 50 * len(faults), 0.1)
        for fault in faults:
            consumer.until_at_work()
            time.sleep(rng.random())
            fault(broker, world, rng)
        sender.hurry()
    print("consumers ended with", consumer.codes)
    assert set(consumer.codes) <= {0, 4}, consumer.errors
    world.catch_up()
    await check(world, expected, f"seed {seed}")
    assert world.letters() == expected.causes


@pytest.mark.parametrize("seed", seeds([2]))
async def test_what_a_broker_acknowledged_counts_once_and_what_others_aborted_never(world, mortal_kafka, seed):
    await disturbed(world, mortal_kafka, seed, EVENTS, [others_transactions, away])


async def test_a_consumer_ends_in_time_while_its_broker_hangs(world, mortal_kafka):
    """Kubernetes kills 30 s after SIGTERM; a step under way, the lag and the group each waited for the broker."""
    sent = traffic(3, EVENTS)
    expected = judged(sent)
    with world.ingest(batch_records_max=100) as consumer:
        world.send(sent)
        consumer.until(EVENTS // 4)
        with mortal_kafka.frozen():
            time.sleep(2.5)  # until it waits, for the lag at the latest
            began_s = time.monotonic()
            consumer.stop()
            assert time.monotonic() - began_s < 25
    world.catch_up()
    await check(world, expected)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("seed", seeds([], fresh=1))
async def test_what_a_broker_acknowledged_counts_once_however_often_it_dies(world, mortal_kafka, seed):
    await disturbed(world, mortal_kafka, seed, 3 * EVENTS, random.Random(seed).choices(FAULTS, k=12))
