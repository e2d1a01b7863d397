"""An item that training never saw and nobody has touched is in slates seconds after the catalogue stream named it."""

import asyncio
import time

import grpc
import pytest
from double11.v1 import event_pb2, event_pb2_grpc, recommend_pb2
from serving_world import TOML

from recsys.core import BadInput
from recsys.core.items import ItemTable
from recsys.serving import ClientConfig, RecommendClient
from recsys.serving.client import AdminClient

GIVEN_UP_S = 60.0


@pytest.fixture(scope="module")
def gateway(serve):
    return serve(toml=TOML + '\n[serving.peak.plans.ranked]\ntier_best = "rank"\n')


@pytest.fixture
async def client(gateway):
    async with RecommendClient(gateway.target, ClientConfig(throttle_ratio=0)) as opened:
        yield opened


@pytest.fixture
async def change(gateway):
    """Publishes an ItemChange."""
    async with grpc.aio.insecure_channel(gateway.target) as channel:
        stub = event_pb2_grpc.EventServiceStub(channel)

        async def publish(item_id, **fields):
            now_us = time.time_ns() // 1_000
            event = event_pb2.Event(event_id=f"{item_id}-{now_us}", event_time_us=now_us)
            event.item.CopyFrom(event_pb2.ItemChange(item_id=item_id, **fields))
            answer = await stub.Publish(event_pb2.PublishRequest(events=[event]), timeout=10)
            assert answer.accepted == 1

        yield publish


async def shown(client, user, **asked):
    slate = await client.recommend(user, deadline_ms=2_000, **asked)
    return slate, {i.item_id: i for i in slate.items}


async def until(client, user, wanted, **asked):
    """Asks until `wanted` of the slate's items holds."""
    began_s = time.monotonic()
    while True:
        slate, items = await shown(client, user, **asked)
        if wanted(items):
            return slate, items
        assert time.monotonic() - began_s < GIVEN_UP_S, f"{list(items)}, {slate.fallbacks}"
        await asyncio.sleep(0.02)


async def test_a_never_seen_item_is_in_slates_within_seconds(gateway, client, change, shoppers, run):
    category = next(c for c in ItemTable.read(run.path("items.parquet")).column("category") if c)
    item, asked = "never-seen-before", recommend_pb2.ItemFilter(brands=["Brand of today"])
    assert not (await shown(client, shoppers[0], item_filter=asked))[1]  # nothing matches, nothing is shown
    await change(item, listed=True, title="A kettle", category=category, brand="Brand of today", price_minor=4_200)
    _, found = await until(client, shoppers[0], lambda items: item in items, limit=500)
    assert found[item].title == "A kettle"
    _, found = await until(
        client, shoppers[0], lambda items: item in items and {"ann", "just_listed"} <= set(items[item].sources),
        limit=500,
    )  # fmt: skip
    asked.price_max_minor = 4_200
    async with AdminClient(gateway.target) as admin:
        for plan in ("", "ranked", "calm", "midnight"):  # tiers full, rank, retrieval, popular
            if plan:
                await admin.activate(plan)
            slate, found = await shown(client, shoppers[0], item_filter=asked)
            assert list(found) == [item], (plan, slate.tier)
            nobody = (await shown(client, "nobody has seen me", item_filter=asked))[1]
            assert list(nobody) == [item]
        await admin.revert()
    asked.price_max_minor = 4_199
    assert not (await shown(client, shoppers[0], item_filter=asked))[1]
    await change(item, listed=False)
    await until(client, shoppers[0], lambda items: item not in items, limit=500)


async def test_a_filtered_slate_is_full_and_holds_nothing_else(client, shoppers, run, dataset):
    items = dataset.items()  # with those that were listed after the run was trained, which may be shown too
    category_of = dict(zip(items["item_id"].to_list(), items["category"].to_list(), strict=True))
    trained = ItemTable.read(run.path("items.parquet")).column("category")
    for category in sorted({c for c in trained if c})[:5]:
        asked = recommend_pb2.ItemFilter(categories=[category])
        slate, found = await shown(client, shoppers[1], item_filter=asked)
        assert slate.tier == recommend_pb2.TIER_FULL, slate.fallbacks
        assert {category_of[i] for i in found} == {category}
        assert len(found) == min(10, trained.count(category)) or len(found) == 10


async def test_a_filter_out_of_its_limits_is_refused(client):
    for asked in (
        recommend_pb2.ItemFilter(categories=["x"] * 101),
        recommend_pb2.ItemFilter(brands=[""]),
        recommend_pb2.ItemFilter(price_min_minor=5, price_max_minor=4),
        recommend_pb2.ItemFilter(price_min_minor=-1),
        recommend_pb2.ItemFilter(allow_item_ids=["x"] * 10_001),
    ):
        with pytest.raises(BadInput, match="filter"):
            await client.recommend("u", deadline_ms=2_000, item_filter=asked)
