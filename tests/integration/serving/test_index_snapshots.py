"""A scoring worker starts from its newest snapshot and the log behind it; what cannot be used is refused."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from double11.v1 import event_pb2

from recsys.candidates.nearest.sharded import WHOLE, Shard
from recsys.core import WallClock, keys, metrics
from recsys.core.items import ItemTable
from recsys.models.config import IndexConfig, LiveIndexConfig
from recsys.serving.catalog import CatalogFollower
from recsys.serving.config import CatalogConfig, WorkerConfig
from recsys.serving.index_snapshots import Snapshots, newest, source_of
from recsys.serving.scoring_service import ScoringService
from streaming.codec import record_key
from streaming.config import JobConfig
from streaming.log import open_log

CONFIGS = IndexConfig(), LiveIndexConfig()


def tell(log, item_id, at_us, listed=True, **fields):
    change = event_pb2.ItemChange(item_id=item_id, listed=listed, **fields)
    event = event_pb2.Event(event_id=f"{item_id}-{at_us}", event_time_us=at_us, item=change)
    producer = log.producer()
    producer.send("catalog", record_key(event), event.SerializeToString())
    producer.flush()
    producer.close()


def refused():
    return metrics.INDEX_SNAPSHOTS.labels("refused")._value.get()


class World:
    """One log, one folder for snapshots; `start` is a worker's start."""

    def __init__(self, run, log, root):
        self.run, self.log, self.root, self.shard = run, log, root, WHOLE
        self.category = next(c for c in ItemTable.read(run.path("items.parquet")).column("category") if c)

    @property
    def of(self):
        return source_of(self.run.run_id, self.log.log_id(), self.shard)

    @asynccontextmanager
    async def start(self, *, follow=True, write=False):
        service = ScoringService(
            self.run, WorkerConfig(), shard=self.shard, restore=lambda dim: newest(self.root, self.of, dim, *CONFIGS)
        )
        config = CatalogConfig(poll_ms=5, watch_s=0.02)
        follower = CatalogFollower(self.log, "catalog", service.items, WallClock(), config, JobConfig())
        if follow:
            follower.start(service.positions)
            assert await follower.wait_caught_up()
        if write:
            snapshots = Snapshots(self.root, self.of, service, follower, 0.05)
            snapshots.start()
            while not list(self.root.glob("live-*/manifest.json")):
                await asyncio.sleep(0.02)
            snapshots.close()
        yield service
        if follow:
            follower.close()
        service.close()

    def has(self, service, *item_ids):
        return service._index.has(keys(item_ids)).tolist()


@pytest.fixture
def world(run, tmp_path):
    with open_log(f"embedded:{tmp_path / 'home'}") as log:
        log.create_topics({"catalog": 2})
        yield World(run, log, tmp_path / "index" / "scoring-0")


async def test_a_start_goes_on_from_the_newest_snapshot(world):
    known = ItemTable.read(world.run.path("items.parquet")).column("item_id")[0]
    tell(world.log, "new", 10, category=world.category, title="A thing")
    tell(world.log, known, 20, listed=False)
    async with world.start(write=True) as service:
        assert world.has(service, "new", known) == [True, False]
    tell(world.log, "newer", 30, category=world.category)
    tell(world.log, known, 19)  # older than the word that the snapshot remembers
    async with world.start(follow=False) as service:
        assert sum(service.positions.values()) == 2
        assert world.has(service, "new", known, "newer") == [True, False, False]
    async with world.start() as service:
        assert world.has(service, "new", known, "newer") == [True, False, True]
        assert service.items._live.arrivals.table().names[0].title == "A thing"
        tell(world.log, "new", 40, listed=False)
        while world.has(service, "new") != [False]:
            await asyncio.sleep(0.01)


async def test_what_cannot_be_used_is_refused_and_the_whole_log_is_read(world):
    tell(world.log, "new", 10, category=world.category)
    async with world.start(write=True) as service:
        dim = service._tower.dim
    before = refused()
    assert newest(world.root, world.of, dim + 1, *CONFIGS) is None
    assert newest(world.root, f"{world.run.run_id}@another log", dim, *CONFIGS) is None
    assert newest(world.root / "none", world.of, dim, *CONFIGS) is None
    assert refused() == before + 2
    (file,) = world.root.glob("live-*/live.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    async with world.start(write=True) as service:
        assert service.positions == {}
        assert world.has(service, "new") == [True]
    assert refused() == before + 3


async def test_a_snapshot_of_one_shard_is_that_shards(world):
    names = [f"new-{i}" for i in range(8)]
    for i, name in enumerate(names):
        tell(world.log, name, 10 + i, category=world.category)
    world.shard, before = Shard(1, 2), refused()
    ours = world.shard.holds(keys(names)).tolist()
    assert True in ours
    assert False in ours
    async with world.start(write=True) as service:
        assert world.has(service, *names) == ours
        items = len(service._index)
    async with world.start(follow=False) as service:
        assert (world.has(service, *names), len(service._index)) == (ours, items)
    for other in (Shard(0, 2), WHOLE):
        world.shard = other
        async with world.start() as service:
            assert world.has(service, *names) == other.holds(keys(names)).tolist()
    assert refused() == before + 2


async def test_items_that_deltas_have_moved_start_as_the_run_has_them(world):
    item_key = ItemTable.read(world.run.path("items.parquet")).item_key[:3]
    tell(world.log, "new", 10, category=world.category)
    async with world.start() as service:
        vectors = service._tower.encode_items(item_key)
        service._index.move(item_key, -vectors)
        service._moved.update(item_key.tolist())
        service.write_snapshot(world.root, world.of, {0: 0, 1: 0})
    async with world.start(follow=False) as service:
        score = service._index.exact(vectors, 1)[1]
        assert score.min() > 0.99
