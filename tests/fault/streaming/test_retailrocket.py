"""Real shoppers, re-enacted at 100 times their speed through Kafka to Redis, while consumers come and go: the features
are those of the offline computation, bit for bit.
"""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from streaming_world import Supervised, World

from feature_store.online import open_reader
from recsys.core import Deadline

NEVER = Deadline.never()
SPEED = 100
DENSEST = "2015-07-14T18:00:00Z"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("retailrocket") / "data"
    source = Path(os.environ["DOUBLE11_DATA"], "retailrocket_mb")
    World("", "", {}).double11("data", "import", "--format", "multi-behaviour", source, "--out", out)
    return out


@pytest.fixture
def world(kafka, redis_server, kafka_config) -> World:
    _, environ = kafka_config("confluent", session_timeout_ms=6_000)
    made = World(f"kafka://{kafka}", redis_server.url, environ)  # 8 partitions, 8 buckets: the defaults
    made.init()
    return made


async def same_as_offline(world: World, dataset: Path, until: str | None, offline: str) -> None:
    """State and values of every user and item."""
    cut = ["--until", until] if until else []
    world.double11("features", "materialize", dataset, "--store", offline, *cut)
    online, reference = open_reader(world.store, world.config), open_reader(offline, world.config)
    at = online.max_event_time_us()
    assert at == reference.max_event_time_us()
    users = pl.read_parquet(dataset / "events.parquet")["user_id"].unique().sort().to_list()
    items = pl.read_parquet(dataset / "items.parquet")["item_id"].unique().sort().to_list()
    assert online.load("user", users) == reference.load("user", users)
    for start in range(0, len(items), 5_000):
        part = items[start : start + 5_000]
        assert online.load("item", part) == reference.load("item", part)
        ours, theirs = await online.items(part, at + 1, NEVER), await reference.items(part, at + 1, NEVER)
        assert np.array_equal(ours.values.view(np.int32), theirs.values.view(np.int32))
    for user_id in users[::20]:
        ours, theirs = await online.user(user_id, at + 1, NEVER), await reference.user(user_id, at + 1, NEVER)
        assert np.array_equal(list(ours.values.values()), list(theirs.values.values()), equal_nan=True)
        assert ours.recent_time_us.tolist() == theirs.recent_time_us.tolist()
        assert np.array_equal(ours.pair_count, theirs.pair_count)
    online.close()
    reference.close()


async def re_enacted(world: World, dataset: Path, tmp_path: Path, until: str, seconds: float) -> None:
    """The history at once, then from DENSEST on at SPEED, which takes so many seconds, with two rebalances in it."""
    world.double11("produce", dataset, "--sink", world.log, "--until", DENSEST)
    produced: list[dict] = []
    command = ("produce", dataset, "--sink", world.log, "--from", DENSEST, "--until", until, "--speed", SPEED)
    producing = threading.Thread(target=lambda: produced.append(world.command(*command)))
    started_s = time.monotonic()
    with Supervised(world, 2, ["--archive", tmp_path / "archive"]) as consumers:
        consumers.until_at_work()
        producing.start()
        for number, sign in enumerate((signal.SIGTERM, signal.SIGKILL)):
            time.sleep(seconds / 3)
            consumers.until_at_work()
            consumers.running[number].process.send_signal(sign)
        producing.join()
        assert time.monotonic() - started_s > seconds * 0.9
    assert produced
    assert produced[0]["events"] > 0
    world.catch_up("--archive", tmp_path / "archive")
    await same_as_offline(world, dataset, until, f"embedded:{tmp_path / 'offline'}")


async def test_a_quarter_of_an_hour_re_enacted_gives_the_offline_features_bit_for_bit(world, dataset, tmp_path):
    await re_enacted(world, dataset, tmp_path, "2015-07-14T18:15:00Z", 9)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
async def test_six_hours_re_enacted_give_the_offline_features_bit_for_bit(world, dataset, tmp_path):
    await re_enacted(world, dataset, tmp_path, "2015-07-15T00:00:00Z", 216)
    world.double11("produce", dataset, "--sink", world.log, "--from", "2015-07-15T00:00:00Z")
    world.catch_up("--archive", tmp_path / "archive")
    await same_as_offline(world, dataset, None, f"embedded:{tmp_path / 'all'}")
