"""`double11 serve --shards 2`: each worker has half of the items, together they answer as one worker does."""

import asyncio
import itertools
import os
import signal
import urllib.request
from contextlib import AsyncExitStack

import numpy as np
import psutil
import pytest
from double11.v1 import event_pb2
from double11.v1 import recommend_pb2 as pb
from serving_world import TOML

from recsys.bench.servers import free_ports
from recsys.candidates.ann import LocalAnnSource
from recsys.candidates.nearest.sharded import Shard, ShardedIndex
from recsys.core import BadInput, Deadline, Query, WallClock, keys
from recsys.core.attributes import Where
from recsys.core.config import Config
from recsys.core.items import ItemTable
from recsys.models.delta import ModelDelta, Rows, encode
from recsys.models.tower import Tower
from recsys.serving import ClientConfig, RecommendClient
from recsys.serving.catalog import CatalogFollower
from recsys.serving.client import AdminClient
from recsys.serving.config import CatalogConfig, WorkerConfig
from recsys.serving.gateway import Gateway, ServeOptions
from recsys.serving.remote import AnnShard, RemoteAnnSource, open_channel
from recsys.serving.scoring_service import ScoringService
from streaming.codec import record_key
from streaming.config import JobConfig
from streaming.log import open_log


@pytest.fixture(scope="module")
def metrics_ports():
    return free_ports(2)


@pytest.fixture(scope="module")
def gateway(serve, metrics_ports):
    toml = f"{TOML}\n[serving.worker]\nmetrics_port = {metrics_ports[0]}\n"
    return serve("--shards", "2", "--arm", "rank", "--no-writer", toml=toml)


@pytest.fixture(scope="module")
def log(gateway):
    with open_log(f"embedded:{gateway.folder}") as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(run, log):
    """What one worker that has all items would know; it follows the same log."""
    service = ScoringService(run, WorkerConfig())
    follower = CatalogFollower(log, "catalog", service.items, WallClock(), CatalogConfig(poll_ms=5), JobConfig())
    follower.start()
    yield service
    follower.close()
    service.close()


@pytest.fixture(scope="module")
def listens(gateway):
    """Where the worker of each shard listens."""
    children = psutil.Process(gateway.process.pid).children(recursive=True)
    found = [dict(itertools.pairwise(child.cmdline())) for child in children]
    return {words["--shard"]: words["--listen"] for words in found}


@pytest.fixture
async def shards(run, listens):
    version = run.manifest["files"]["models/tower.safetensors"]["sha256"][:12]
    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(open_channel(listens[f"{i}/2"])) for i in range(2)]
        yield [AnnShard(channel, Shard(i, 2), version) for i, channel in enumerate(channels)]


def tell(log, listed, titles, at_us):
    """titles: by item. Each another, or equal vectors would have no order of their own."""
    producer = log.producer()
    for item_id, title in titles.items():
        change = event_pb2.ItemChange(item_id=item_id, listed=listed, title=title)
        event = event_pb2.Event(event_id=f"{item_id}-{at_us}", event_time_us=at_us, item=change)
        producer.send("catalog", record_key(event), event.SerializeToString())
    producer.flush()
    producer.close()


def questions(dataset, shoppers, items):
    """Shoppers' searches: everything, new to them, of categories, of prices, of a list."""
    categories = sorted({c for c in items.column("category") if c})
    prices = sorted(p for p in items.column("price") if p is not None)
    wheres = [
        Where(),
        Where(categories=frozenset(categories[:2])),
        Where(deny_categories=frozenset(categories[:1]), price_max_minor=prices[len(prices) // 2]),
        Where(allow=items.item_key[::3]),
    ]
    for user_id in shoppers[:4]:
        for where in wheres:
            for new_only in (False, True):
                yield Query(
                    user_id=user_id, as_of_us=dataset.last_event_us + 1, request_id="r", where=where, new_only=new_only
                )


def test_every_worker_has_a_metrics_port(gateway, metrics_ports):
    for port in metrics_ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            assert "double11_index_items" in response.read().decode()


async def start_over(workers, run, folder):
    """The status of a gateway that is told where the workers of each shard are."""
    options = ServeOptions(
        run=run.root, store=f"embedded:{folder}", log=f"embedded:{folder}", listen="127.0.0.1:0", arm="rank",
        writer=False,
    )  # fmt: skip
    gateway = Gateway(options, Config({"serving": {"scoring_shards": workers}, "feature_store": {"clock": "data"}}))
    try:
        await gateway.start()
        await gateway.wait_ready()
        return {p.name: p.state for p in gateway.status().parts}
    finally:
        await gateway.stop()


async def ask(source, store, query, limit=40):
    user = await store.user(query.user_id, query.as_of_us, Deadline.never())
    return await source.retrieve(query, user, limit, Deadline.never())


async def until(condition):
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_two_shards_answer_as_one_worker(run, dataset, shoppers, store, log, whole, shards):
    items = ItemTable.read(run.path("items.parquet"))
    remote, local = RemoteAnnSource(shards), LocalAnnSource(whole._tower, whole._index)
    everything = Query(user_id=shoppers[0], as_of_us=dataset.last_event_us + 1, request_id="r")

    async def alike():
        asked = questions(dataset, shoppers, items)
        pairs = [(await ask(remote, store, q), await ask(local, store, q)) for q in asked]
        assert len(pairs) == 32
        return all(a.item_key.tolist() == b.item_key.tolist() for a, b in pairs) and all(
            np.allclose(a.scores, b.scores, rtol=1e-5) for a, b in pairs
        )

    async def holds(names, there):
        found = [(await ask(s, store, everything, 10_000)).item_key for s in (remote, local)]
        return all(np.isin(keys(names), f).tolist() == [there] * len(names) for f in found)

    await until(alike)
    new = {f"new-{i}": title for i, title in enumerate(sorted(set(items.column("title")))[:6])}
    tell(log, True, new, dataset.last_event_us + 1)
    await until(lambda: holds(new, True))
    assert await alike()
    each = [(await ask(RemoteAnnSource([s]), store, everything, 10_000)).item_key for s in shards]
    assert [Shard(i, 2).holds(e).all() for i, e in enumerate(each)] == [True, True]
    all_keys = (await ask(local, store, everything, 10_000)).item_key
    assert np.sort(np.concatenate(each)).tolist() == np.sort(all_keys).tolist()
    gone = new | {items.column("item_id")[0]: ""}
    tell(log, False, gone, dataset.last_event_us + 2)
    await until(lambda: holds(gone, False))
    assert await alike()


async def test_a_gateway_is_told_where_the_shards_are(run, gateway, listens):
    parts = await start_over([listens["0/2"], listens["1/2"]], run, gateway.folder)
    names = ("store", "ranker", "index-shard-0/2", "index-shard-1/2", "catalog", "indexes")
    assert parts == dict.fromkeys(names, "ok")
    with pytest.raises(BadInput, match=r"shard 1/2 of the items; expected shard 0/2.*scoring_shards"):
        await start_over([listens["1/2"], listens["0/2"]], run, gateway.folder)


async def test_a_shard_killed_during_queries_costs_its_items_and_no_request(gateway, shoppers):
    async with RecommendClient(gateway.target, ClientConfig(throttle_ratio=0)) as client:

        async def slates():
            return await asyncio.gather(*(client.recommend(u, limit=50, deadline_ms=5_000) for u in shoppers[:4]))

        async def parts():
            async with AdminClient(gateway.target) as admin:
                return {p.name: (p.state, p.detail) for p in (await admin.status()).parts}

        async def back():
            good = all(s.tier == pb.TIER_RANK and not s.fallbacks for s in await slates())
            return good and (await parts())["index-shard-1/2"][0] == "ok"

        await until(back)
        asking = asyncio.create_task(slates())
        os.kill(gateway.child_pid("scoring-1of2-0"), signal.SIGKILL)
        assert [len(slate.items) for slate in await asking] == [50] * 4
        seen = [await slates() for _ in range(2)][-1]  # the connection's end is known by now
        state, detail = (await parts())["index-shard-1/2"]
        if state == "down":  # else it is back already
            assert "UNAVAILABLE" in detail
            half = {k for s in seen for i in s.items if "ann" in i.sources for k in keys([i.item_id]).tolist()}
            assert Shard(0, 2).holds(np.array(sorted(half))).all()
        assert {s.tier for s in seen} == {pb.TIER_RANK}
        assert not any("ann" in f or "rank" in f for s in seen for f in s.fallbacks)
        await until(back)
    assert "event=index_shard_missing" in gateway.errors()


def test_deltas_move_the_items_of_the_shard(run):
    whole, *parts = [ScoringService(run, WorkerConfig(), shard=s) for s in (Shard(), Shard(0, 2), Shard(1, 2))]
    moved = Tower.load(run).items.vocabulary.keys[:20]
    values = np.random.default_rng(0).normal(size=(20, whole._tower.dim)).astype(np.float32)
    delta = ModelDelta(run_id=run.run_id, sequence=1, tables={"tower.item": Rows(moved, values)}, dense={})
    queries = whole._tower.encode_items(moved)
    before = whole._index.search(queries, 30)
    for service in (whole, *parts):
        assert [service.take_delta(part) for part in encode(delta)] == [True]
    after = whole._index.search(queries, 30)
    together = ShardedIndex([part._index for part in parts]).search(queries, 30)
    assert not np.array_equal(before[0], after[0])
    np.testing.assert_array_equal(together[0], after[0])
    np.testing.assert_allclose(together[1], after[1], rtol=1e-5)
    assert [len(part._moved) for part in parts] == [np.count_nonzero(Shard(i, 2).holds(moved)) for i in range(2)]
    for service in (whole, *parts):
        service.close()
