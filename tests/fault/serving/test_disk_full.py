"""A disk that runs full: producers hear of it, slates go on, and with room again nothing acknowledged is missing."""

import asyncio
import time

import grpc
from double11.v1 import event_pb2 as pb
from double11.v1 import event_pb2_grpc as pb_grpc
from double11.v1 import recommend_pb2
from full_disk import files_end_at

from feature_store.online import open_reader
from recsys.core import Deadline
from recsys.serving import ClientConfig, RecommendClient
from recsys.serving.client import AdminClient
from streaming.codec import decode_events
from streaming.log import open_log
from streaming.log.base import read_all
from streaming.topics import Topics

USER, ITEM, A_REQUEST, EVENTS_MAX = "disk-full", "i", 500, 200_000


def events(first):
    """Views of one user, numbered."""
    now_us = time.time_ns() // 1_000
    action = pb.Action(type=pb.ACTION_TYPE_VIEW, user_id=USER, item_id=ITEM)
    return [pb.Event(event_id=f"full-{first + i}", event_time_us=now_us, action=action) for i in range(A_REQUEST)]


async def test_a_full_disk_is_told_to_producers_and_nothing_acknowledged_is_lost(serve, shoppers):
    gateway = serve()
    url, acknowledged = f"embedded:{gateway.folder}", list[str]()
    async with (
        grpc.aio.insecure_channel(gateway.target) as channel,
        RecommendClient(gateway.target, ClientConfig(throttle_ratio=0)) as client,
    ):
        stub = pb_grpc.EventServiceStub(channel)

        async def publish():
            sent = events(len(acknowledged))
            answer = await stub.Publish(pb.PublishRequest(events=sent), timeout=20)
            assert answer.accepted == A_REQUEST
            acknowledged.extend(event.event_id for event in sent)

        await publish()
        log, store = (gateway.folder / part / "data.mdb" for part in ("log/events", "store"))
        with (
            files_end_at(log.stat().st_size, gateway.process.pid),
            files_end_at(store.stat().st_size, gateway.child_pid("writer")),
        ):
            refused = None
            while refused is None:
                assert len(acknowledged) < EVENTS_MAX, "never full"
                try:
                    await publish()
                except grpc.aio.AioRpcError as error:
                    refused = error
            assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "Free disk" in refused.details()
            slates = [await client.recommend(user, deadline_ms=2_000) for user in shoppers[:20]]
            assert {len(slate.items) for slate in slates} == {10}
            assert recommend_pb2.TIER_FULL in {slate.tier for slate in slates}
        await publish()
        async with AdminClient(gateway.target) as admin:
            assert {part.state for part in (await admin.status()).parts} == {"ok"}
    with open_log(url) as log:
        ids = decode_events([v for batch in read_all(log, Topics().events) for v in batch.values]).batch
        stored = {i for i in ids.strings("event_id") if i.startswith("full-")}  # who was refused may have been stored
    assert stored >= set(acknowledged)
    reader = open_reader(url)
    async with asyncio.timeout(60):
        while True:
            user = await reader.user(USER, time.time_ns() // 1_000, Deadline.never())
            if user.values["view_count_all"] == len(stored):
                break
            await asyncio.sleep(0.1)
    reader.close()
    assert gateway.stop() == 0
