"""A whole shop for minutes, on Kafka and a Redis Cluster, each process killed or stopped in turn.

Slates stay whole, what is counted is what was archived, nothing grows. DOUBLE11_SOAK_S says for how long.
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import grpc
import psutil
import pytest
from double11.v1 import event_pb2, event_pb2_grpc, recommend_pb2
from kafka_broker import settings
from redis_world import Cluster
from serving_world import TOML, Gateway, done, toml_of

from feature_store.online import MemoryStore, open_reader
from recsys.core import Double11Error
from recsys.data import Dataset
from recsys.serving import ClientConfig, RecommendClient
from recsys.serving.client import AdminClient

SOAK_S = float(os.environ.get("DOUBLE11_SOAK_S", "180"))
PAUSE_S = 12.0  # between faults: who is killed has to import everything again, on two cores
RATE = 8  # requests a second; each is followed by an event or two
FAST = """
[streaming.samples]
window_s = 5.0
grace_s = 1.0
idle_s = 2.0

[training.online]
interval_s = 1.0
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SOAK_S + 900)]


class Command:
    """A `double11` command that runs until it is told to end, and begins again after a kill."""

    def __init__(self, *args):
        self._argv = [sys.executable, "-c", "from recsys.cli.main import main; main()", *map(str, args)]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(120)

    async def killed(self):
        self.end(signal.SIGKILL)
        await asyncio.sleep(2.0)
        self.start()


class Shop:
    """Everything, with the catalogue and the past of a simulated world in it."""

    def __init__(self, folder, kafka, run, dataset):
        self.redis, self.log, self.archive = Cluster(folder / "redis"), f"kafka://{kafka}", folder / "archive"
        home = folder / "home"
        home.mkdir()
        toml, config = TOML + toml_of(settings("confluent")) + FAST, ("--config", home / "double11.toml")
        config[1].write_text(toml)
        done("streaming", "init", "--log", self.log, *config)
        done("produce", dataset.root, "--sink", self.log, *config)
        job = ("ingest", "--source", self.log, "--store", self.redis.url, "--archive", self.archive)
        job += ("--offline", folder / "offline", *config)
        done(*job, "--until-caught-up")
        self.job = Command(*job)
        args = ("--no-writer", "--store", self.redis.url, "--log", self.log)
        self.gateway = Gateway(home, run.root, *args, toml=toml).wait_ready()
        state = ("--state", folder / "online", *config)
        self.trainer = Command("train-online", "--run", run.root, "--log", self.log, "--store", self.redis.url, *state)

    def close(self):
        for process in (self.job.process, self.trainer.process):
            process.kill()
            process.wait()
        self.gateway.__exit__()
        self.redis.stop()

    async def faults(self, pause_s, until_s):
        """One after the other, round and round."""
        for name in itertools.cycle(("redis", "scoring-0", "trainer", "rerank", "job")):
            await asyncio.sleep(pause_s)
            if time.monotonic() > until_s:
                return
            if name == "redis":
                node = psutil.Process(self.redis.nodes[0].client.info("server")["process_id"])
                node.suspend()
                await asyncio.sleep(2.0)
                node.resume()
            elif name in ("trainer", "job"):
                await getattr(self, name).killed()
            else:
                os.kill(self.gateway.child_pid(name), signal.SIGKILL)


class Traffic:
    """Shoppers who ask, and act on some of what they are shown."""

    def __init__(self, client, events, shoppers):
        self._client, self._events, self._shoppers, self._random = client, events, shoppers, random.Random(11)
        self._number = itertools.count()
        self.asked, self.refused, self.lengths = 0, Counter(), Counter()

    async def until(self, until_s):
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < until_s:
                group.create_task(self._one())
                await asyncio.sleep(self._random.expovariate(RATE))

    async def _one(self):
        user = self._random.choice(self._shoppers)
        self.asked += 1
        try:
            slate = await self._client.recommend(user, deadline_ms=1_000)
        except Double11Error as error:
            self.refused[error.code] += 1
            return
        self.lengths[len({i.item_id for i in slate.items})] += 1
        shown = [(place, item.item_id) for place, item in enumerate(slate.items, 1) if self._random.random() < 0.2]
        acted = [self._event(user, slate.request_id, place, item) for place, item in shown]
        with contextlib.suppress(grpc.aio.AioRpcError):  # not acknowledged: counted or not, but never twice
            await self._events.Publish(event_pb2.PublishRequest(events=acted), timeout=10)

    def _event(self, user, request_id, place, item_id):
        event = event_pb2.Event(event_id=f"soak-{next(self._number)}", event_time_us=time.time_ns() // 1_000)
        kind = self._random.choice([event_pb2.ACTION_TYPE_VIEW, event_pb2.ACTION_TYPE_CART])
        event.action.CopyFrom(
            event_pb2.Action(type=kind, user_id=user, item_id=item_id, request_id=request_id, position=place)
        )
        return event


@pytest.fixture
def shop(kafka, run, dataset, tmp_path):
    made = Shop(tmp_path, kafka, run, dataset)
    yield made
    made.close()


def held(pid):
    """Files, threads and MiB of its own."""
    process = psutil.Process(pid)
    return process.num_fds(), process.num_threads(), process.memory_full_info().uss >> 20


async def test_a_shop_under_faults_stays_whole_and_does_not_grow(shop, shoppers):
    began_s = time.monotonic()
    async with (
        RecommendClient(shop.gateway.target, ClientConfig(throttle_ratio=0)) as client,
        grpc.aio.insecure_channel(shop.gateway.target) as channel,
        AdminClient(shop.gateway.target) as admin,
    ):
        traffic = Traffic(client, event_pb2_grpc.EventServiceStub(channel), shoppers)
        faults = asyncio.create_task(shop.faults(PAUSE_S, began_s + 0.85 * SOAK_S))
        await traffic.until(began_s + SOAK_S / 3)
        warm = held(shop.gateway.process.pid)
        await traffic.until(began_s + SOAK_S)
        await faults
        files, threads, mib = held(shop.gateway.process.pid)
        assert files <= warm[0] + 16, (warm, files)
        assert threads <= warm[1] + 8, (warm, threads)
        assert mib <= 1.2 * warm[2] + 32, (warm, mib)
        assert held(shop.trainer.process.pid)[0] < 100
        assert traffic.lengths.keys() == {10}, traffic.lengths
        assert traffic.refused.total() <= 0.02 * traffic.asked, traffic.refused
        async with asyncio.timeout(60):
            while (slate := await client.recommend(shoppers[0], deadline_ms=2_000)).fallbacks:
                await asyncio.sleep(0.2)
            assert slate.tier == recommend_pb2.TIER_FULL
            while {part.state for part in (await admin.status()).parts} != {"ok"}:
                await asyncio.sleep(0.2)
        parts = {part.name: part.detail for part in (await admin.status()).parts}
        assert int(parts["indexes"].split("delta ")[1].split(",")[0]) >= 3, parts
    assert shop.trainer.end() == 0
    assert shop.job.end() == 0
    counted, archived = open_reader(shop.redis.url), MemoryStore()
    for batch in Dataset.open(shop.archive).event_batches():
        archived.apply(batch)
    for user in shoppers:
        assert counted.load("user", [user]) == archived.load("user", [user]), user
    counted.close()
