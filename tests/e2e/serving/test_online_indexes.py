"""An item of today goes with what its shoppers took, and is wanted: slates hold it for these reasons, seconds later."""

import asyncio
import time

import grpc
import pytest
from double11.v1 import event_pb2, event_pb2_grpc, recommend_pb2
from double11.v1.delta_pb2 import Delta
from double11.v1.sample_pb2 import Sample
from serving_world import done

from recsys.core import EventType
from recsys.serving import ClientConfig, RecommendClient
from recsys.serving.client import AdminClient
from streaming.log import open_log
from streaming.topics import Topics

GIVEN_UP_S = 60.0
NEW = "listed-today"


@pytest.fixture(scope="module")
def gateway(serve):
    return serve()


async def indexes_of(gateway):
    """What the gateway says of its indexes."""
    async with AdminClient(gateway.target) as admin:
        return next(p for p in (await admin.status()).parts if p.name == "indexes")


async def list_item(gateway, item_id):
    event = event_pb2.Event(event_id=item_id, event_time_us=time.time_ns() // 1_000)
    event.item.CopyFrom(event_pb2.ItemChange(item_id=item_id, listed=True, title="A kettle"))
    async with grpc.aio.insecure_channel(gateway.target) as channel:
        answer = await event_pb2_grpc.EventServiceStub(channel).Publish(
            event_pb2.PublishRequest(events=[event]), timeout=10
        )
    assert answer.accepted == 1


def send(url, samples):
    with open_log(url) as log:
        producer = log.producer()
        for sample in samples:
            producer.send(Topics().samples, sample.user_id.encode(), sample.SerializeToString())
        producer.close()


async def test_a_new_item_is_linked_to_what_its_shoppers_took_and_trends(gateway, run, dataset, shoppers):
    url = f"embedded:{gateway.folder}"
    events = dataset.events()
    asking = shoppers[0]
    taken = events.filter((events["user_id"] == asking) & (events["event_type"] == "purchase"))["item_id"][-1]
    others = [u for u in shoppers[1:] if u != asking][:4]
    await list_item(gateway, NEW)
    assert (await indexes_of(gateway)).detail == f"run {run.run_id}, delta 0, 0 rows"
    bought = [(user, item) for user in others for item in (taken, NEW)]
    send(
        url,
        [
            Sample(
                sample_id=f"links-{number}", user_id=user, item_id=item, event_time_us=dataset.last_event_us + number,
                position=1, action_types=[int(EventType.PURCHASE)],
            )
            for number, (user, item) in enumerate(bought)
        ],
    )  # fmt: skip
    done(
        "train-online", "--run", run.root, "--log", url, "--state", gateway.folder / "online", "--until-caught-up",
        "--config", gateway.folder / "double11.toml",
    )  # fmt: skip
    began_s = time.monotonic()
    async with RecommendClient(gateway.target, ClientConfig(throttle_ratio=0)) as client:
        while True:
            slate = await client.recommend(asking, deadline_ms=2_000, limit=500)
            sources = {i.item_id: set(i.sources) for i in slate.items}
            if {"swing", "trending"} <= sources.get(NEW, set()):
                break
            assert time.monotonic() - began_s < GIVEN_UP_S, (sources.get(NEW), slate.fallbacks)
        async with AdminClient(gateway.target) as admin:  # what answers where nothing else can
            await admin.activate("midnight")
            slate = await client.recommend("nobody has seen me", deadline_ms=2_000, limit=500)
            await admin.revert()
        assert slate.tier == recommend_pb2.TIER_POPULAR
        assert "popular" in next(set(i.sources) for i in slate.items if i.item_id == NEW)
        async with AdminClient(gateway.target) as admin:  # answers and status say which delta is in force
            while not (await client.recommend(asking, deadline_ms=2_000)).versions.get("ranker", "").endswith("+1"):
                assert time.monotonic() - began_s < GIVEN_UP_S
            assert (await admin.status()).versions["ranker"].endswith("+1")
    told = await indexes_of(gateway)
    assert told.state == "ok"
    assert told.detail.startswith(f"run {run.run_id}, delta 1, ")
    assert int(told.detail.split()[-2]) > 2
    with open_log(url) as log:  # a gap
        producer = log.producer()
        producer.send(Topics().deltas, b"r", Delta(run_id=run.run_id, sequence=9, num_parts=1).SerializeToString())
        producer.close()
    async with asyncio.timeout(GIVEN_UP_S), AdminClient(gateway.target) as admin:
        while (scoring := next(p for p in (await admin.status()).parts if p.name == "scoring-0")).state == "ok":
            await asyncio.sleep(0.05)
    assert scoring.state == "degraded"
    assert "stopped: delta, sequence: got 9; expected 2" in scoring.detail
