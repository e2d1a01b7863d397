"""A shard of the index that is late, away, of other items or of another run: the others' answers are used."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from double11.v1 import scoring_pb2 as pb
from double11.v1 import scoring_pb2_grpc

from feature_store.online.memory import MemoryStore
from recsys.candidates.nearest.sharded import Shard
from recsys.core import BadInput, Deadline, DeadlineExceeded, EventBatch, EventKind, Query, Unavailable
from recsys.core.metrics import INDEX_SHARDS_MISSING
from recsys.serving.remote import AnnShard, RemoteAnnSource, RemoteScorer, open_channel
from recsys.serving.server import Server

SERVICE = "double11.v1.ScoringService"
SCORES = {0: [9.0, 5.0, 1.0], 1: [7.0, 6.0, 2.0]}  # of the items 10 to 12 and 20 to 22


class Worker(scoring_pb2_grpc.ScoringServiceServicer):
    """Answers as a worker of shard `number` of 2 would, or never."""

    def __init__(self, number, count=2, version="tower+3"):
        self.shard, self.version, self.hangs, self.ranked = Shard(number, count), version, False, 0

    async def Retrieve(self, request, context):  # noqa: N802
        if self.hangs:
            await asyncio.Event().wait()
        number = self.shard.number
        return pb.RetrieveResponse(
            item_keys=[10 * (number + 1) + i for i in range(3)],
            scores=SCORES[number],
            version=self.version,
            shard=number,
            num_shards=self.shard.count,
        )

    async def Rank(self, request, context):  # noqa: N802
        self.ranked += 1
        return pb.RankResponse(scores=[], version="ranker")


class World:
    """Two workers, each with a server of its own, and a user with a past."""

    def __init__(self):
        self.stack, self.servers, self.channels = AsyncExitStack(), [], []
        store = MemoryStore()
        store.apply(
            EventBatch.from_columns(
                {"event_id": ["e"], "kind": [EventKind.ACTION], "event_type": [2], "event_time": [5],
                 "user_id": ["u"], "item_id": ["i"]}
            )
        )  # fmt: skip
        self.store, self.query = store, Query(user_id="u", as_of_us=10, request_id="r")

    async def source(self, *workers, version="tower"):
        for worker in workers:
            self.servers.append(Server(0.1))
            scoring_pb2_grpc.add_ScoringServiceServicer_to_server(worker, self.servers[-1].grpc)
            port = await self.servers[-1].start("127.0.0.1:0", [SERVICE])
            self.stack.push_async_callback(self.servers[-1].drain)
            self.channels.append(await self.stack.enter_async_context(open_channel(f"127.0.0.1:{port}")))
        self.shards = [AnnShard(c, Shard(i, len(workers)), version) for i, c in enumerate(self.channels)]
        return RemoteAnnSource(self.shards)

    async def ask(self, source, limit=4, within_ms=60_000):
        user = await self.store.user("u", 10, Deadline.never())
        deadline = Deadline.after_ms(within_ms)
        async with asyncio.timeout(deadline.timeout_s() * 1.25):  # `Budget.given_up`
            found = await source.retrieve(self.query, user, limit, deadline)
        return found.item_key.tolist()


@pytest.fixture
async def world():
    made = World()
    async with made.stack:
        yield made


def missing(shard, reason):
    return INDEX_SHARDS_MISSING.labels(shard, reason)._value.get()


async def test_all_shards_are_asked_and_merged(world):
    source = await world.source(Worker(0), Worker(1))
    await source.check()
    assert await world.ask(source) == [10, 20, 21, 11]
    assert await world.ask(source, 10) == [10, 20, 21, 11, 22, 12]
    assert [(p.name, p.state, p.detail) for p in source.status()] == [
        ("index-shard-0/2", "ok", ""), ("index-shard-1/2", "ok", "")
    ]  # fmt: skip


async def test_a_late_shard_is_left_out_in_time(world):
    late, before = Worker(1), missing("1/2", "timeout")
    source = await world.source(Worker(0), late)
    late.hangs = True
    assert await world.ask(source, within_ms=2_000) == [10, 11, 12]
    assert missing("1/2", "timeout") == before + 1
    assert [p.state for p in source.status()] == ["ok", "down"]
    assert "DEADLINE_EXCEEDED" in source.status()[1].detail
    late.hangs = False
    assert await world.ask(source) == [10, 20, 21, 11]
    assert [p.state for p in source.status()] == ["ok", "ok"]


async def test_a_shard_that_is_away_is_left_out(world):
    source, before = await world.source(Worker(0), Worker(1)), missing("0/2", "unavailable")
    await world.servers[0].grpc.stop(0)
    assert await world.ask(source) == [20, 21, 22]
    assert missing("0/2", "unavailable") == before + 1


async def test_without_any_shard_the_source_fails(world):
    source = await world.source(Worker(0), Worker(1))
    for server in world.servers:
        await server.grpc.stop(0)
    with pytest.raises(Unavailable):
        await world.ask(source)


async def test_one_worker_without_shards_has_all_of_the_time(world):
    alone = Worker(0, 1)
    source = await world.source(alone, version="")
    assert await world.ask(source) == [10, 11, 12]
    assert [(p.name, p.state) for p in source.status()] == [("index-shard-0/1", "ok")]
    alone.hangs = True
    with pytest.raises(DeadlineExceeded):
        await world.ask(source, within_ms=50)
    assert "DEADLINE_EXCEEDED" in source.status()[0].detail


@pytest.mark.parametrize("workers", [[Worker(1), Worker(0)], [Worker(0), Worker(1, 3)], [Worker(0, 1), Worker(1)]])
async def test_workers_of_other_items_end_the_start_and_are_never_merged(world, workers):
    source = await world.source(*workers)
    with pytest.raises(BadInput, match=r"shard ./. of the items; expected shard ./2\. .*scoring_shards"):
        await source.check()
    wrong = sum(str(w.shard) != f"{i}/2" for i, w in enumerate(workers))
    before = missing("0/2", "bad-input") + missing("1/2", "bad-input")
    if wrong == 2:
        with pytest.raises(BadInput):
            await world.ask(source)
    else:
        assert len(await world.ask(source, 10)) == 3
    assert missing("0/2", "bad-input") + missing("1/2", "bad-input") == before + wrong


async def test_a_worker_of_a_shard_is_no_worker_of_everything(world):
    with pytest.raises(BadInput, match="shard 0/2 of the items; expected shard 0/1"):
        await world.ask(await world.source(Worker(0, 2), version=""))


async def test_a_shard_of_another_run_is_left_out(world):
    source = await world.source(Worker(0), Worker(1, version="other"))
    await source.check()  # a rollout is no reason not to start
    assert await world.ask(source) == [10, 11, 12]
    assert "tower other; expected tower tower" in source.status()[1].detail


async def test_rank_goes_round_the_workers_that_are_connected(world):
    workers = [Worker(0), Worker(1)]
    await (await world.source(*workers)).check()
    scorer = RemoteScorer(world.channels, "")

    async def rank(times):
        for _ in range(times):
            await scorer._next().Rank(pb.RankRequest(), timeout=60)
        return [w.ranked for w in workers]

    assert await rank(4) == [2, 2]
    await world.servers[0].grpc.stop(0)
    while world.channels[0].get_state().name == "READY":
        await asyncio.sleep(0.01)
    assert await rank(4) == [2, 6]
