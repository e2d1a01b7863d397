"""EventService over the wire on a real log: the rate limit refuses aloud, and what it accepted is durable."""

import asyncio
import time

import grpc
import pytest
from double11.v1 import event_pb2 as pb
from double11.v1 import event_pb2_grpc as pb_grpc

from recsys.core.murmur2 import partition_of
from recsys.serving.config import PublishConfig, ServingConfig
from recsys.serving.event_service import ACCEPTED, EventService
from recsys.serving.log_writer import LogWriter
from recsys.serving.server import Server
from streaming.codec import decode_events
from streaming.log import open_log
from streaming.log.base import read_all
from streaming.topics import StreamingConfig, Topics

PUSHBACK = "grpc-retry-pushback-ms"
PARTITIONS = StreamingConfig(partitions=4).partitions_by_topic(Topics())


@pytest.fixture
def log(tmp_path):
    with open_log(f"embedded:{tmp_path}") as opened:
        opened.create_topics(PARTITIONS)
        yield opened


@pytest.fixture
async def service(log):
    """Starts an EventService with a PublishConfig; gives its stub."""
    started = []

    async def start(serving=ServingConfig(), **publish):  # noqa: B008 - frozen
        writer, server = LogWriter(log.producer(), 8 << 20), Server(1.0)
        events = EventService(writer, Topics(), PARTITIONS, serving, PublishConfig(**publish))
        pb_grpc.add_EventServiceServicer_to_server(events, server.grpc)
        port = await server.start("127.0.0.1:0", [])
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        started.append((channel, server, writer))
        return pb_grpc.EventServiceStub(channel)

    yield start
    for channel, server, writer in started:
        await channel.close()
        await server.drain()
        writer.close(5.0)


def events(first, number, **body):
    now_us = time.time_ns() // 1_000
    body = body or {"action": pb.Action(type=pb.ACTION_TYPE_VIEW, user_id="u", item_id="i")}
    return [pb.Event(event_id=f"e{first + i}", event_time_us=now_us, **body) for i in range(number)]


def stored(log, topic="events"):
    return [i for b in read_all(log, topic) for i in decode_events(b.values, b.headers).batch.strings("event_id")]


async def test_over_the_limit_a_batch_is_refused_whole_and_passes_after_the_time_it_names(service, log):
    stub = await service(events_per_s_max=200, burst_s=0.5)
    assert (await stub.Publish(pb.PublishRequest(events=events(0, 100)), timeout=10)).accepted == 100
    again = pb.PublishRequest(events=events(100, 50))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Publish(again, timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "50 events of ipv4:127.0.0.1" in caught.value.details()
    retry_ms = int(dict(caught.value.trailing_metadata())[PUSHBACK])
    assert 0 < retry_ms <= 250
    assert len(stored(log)) == 100
    await asyncio.sleep(retry_ms / 1e3)
    assert (await stub.Publish(again, timeout=10)).accepted == 50
    assert len(stored(log)) == 150


@pytest.mark.parametrize("tenant_key", ["x-shop", "X-Shop"])  # on the wire it is the former
async def test_tenants_are_named_by_metadata_and_limited_apart(service, tenant_key):
    stub = await service(events_per_s_max=0, tenant_events_per_s_max=10, burst_s=1, tenant_key=tenant_key)
    for shop in ("a", "b"):
        request = pb.PublishRequest(events=events(0, 10))
        assert (await stub.Publish(request, timeout=10, metadata=(("x-shop", shop),))).accepted == 10
    with pytest.raises(grpc.aio.AioRpcError, match="of a, over the rate limit"):
        await stub.Publish(request, timeout=10, metadata=(("x-shop", "a"),))
    assert (await stub.Publish(request, timeout=10)).accepted == 10  # named by nobody: the address


async def test_a_stream_is_held_back_to_the_rate(service, log):
    stub = await service(events_per_s_max=400, burst_s=0.25)
    chunks = [pb.PublishStreamRequest(events=events(c * 100, 100)) for c in range(4)]
    began_s = time.monotonic()
    answer = await stub.PublishStream(iter(chunks), timeout=20)
    assert answer.accepted == 400
    assert time.monotonic() - began_s > 0.7  # three chunks waited a quarter of a second each
    assert len(stored(log)) == 400


@pytest.mark.parametrize("timeout_s", [None, 20])
async def test_a_stream_is_held_back_for_longer_than_a_request_may_take(service, log, timeout_s):
    """What a chunk may wait for is bounded by wait_s_max and by the call's own deadline, once there is one."""
    a_request = ServingConfig(deadline_ms_default=400, deadline_ms_max=400)
    stub = await service(a_request, events_per_s_max=200, burst_s=0.25)
    first, half_a_second_later, seconds_later = (
        pb.PublishStreamRequest(events=events(c * 500, n)) for c, n in enumerate((100, 500, 1))
    )
    assert (await stub.PublishStream(iter([first, half_a_second_later]), timeout=timeout_s)).accepted == 600
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.PublishStream(iter([seconds_later]), timeout=1)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(stored(log)) == 600


async def test_a_refused_stream_says_how_much_of_it_is_durable(service, log):
    stub = await service(events_per_s_max=10, burst_s=10, wait_s_max=0.1)
    bad = pb.Event(event_id="bad", event_time_us=-1)
    chunks = [[*events(0, 50), bad], events(50, 40), events(90, 40)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.PublishStream(iter([pb.PublishStreamRequest(events=c) for c in chunks]), timeout=20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    told = dict(caught.value.trailing_metadata())
    assert told[ACCEPTED] == "90"
    assert int(told[PUSHBACK]) > 1_000
    assert sorted(stored(log)) == sorted(f"e{i}" for i in range(90))


async def test_a_catalogue_change_lies_in_its_items_partition_under_a_key_of_its_kind(service, log):
    stub = await service()
    item = "item-42"
    sent = [
        *events(0, 1, stock=pb.StockChange(item_id=item, stock_units=0)),
        *events(1, 1, price=pb.PriceChange(item_id=item, price_minor=5)),
        *events(2, 1, item=pb.ItemChange(item_id=item, listed=True, title="t")),
    ]
    assert (await stub.Publish(pb.PublishRequest(events=sent), timeout=10)).accepted == 3
    (batch,) = read_all(log, "catalog")
    assert batch.partition == partition_of(item.encode(), 4)
    assert batch.keys == [b"item-42\0stock", b"item-42\0price", b"item-42\0item,title"]
