"""A real server and channel on loopback: errors become statuses, malformed bytes are the caller's mistake.

And who is silent keeps its connection.
"""

import asyncio
import collections
import socket
import struct

import grpc
import pytest
from double11.v1 import event_pb2, event_pb2_grpc, recommend_pb2, recommend_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from recsys.core import BadInput, CorruptData, Deadline, Overloaded, Unavailable
from recsys.core.rpc import SERVER, TO_WORKERS
from recsys.serving import RecommendClient
from recsys.serving.server import Server, on_loopback
from recsys.serving.wire import deadline_of

SERVICE = "double11.v1.EventService"


class Events(event_pb2_grpc.EventServiceServicer):
    """Does what the first event's id says."""

    deadline: Deadline

    async def Publish(self, request, context):  # noqa: N802
        self.deadline = deadline_of(context, 200, 1_000)
        errors = {"bad": BadInput, "corrupt": CorruptData, "busy": Overloaded}
        kind = errors.get(request.events[0].event_id if request.events else "")
        if kind is not None:
            raise kind("Publish", came="this", expected="that", fix="Mend it.")
        return event_pb2.PublishResponse(accepted=len(request.events))

    async def PublishStream(self, requests, context):  # noqa: N802
        return event_pb2.PublishStreamResponse(accepted=sum([len(r.events) async for r in requests]))


@pytest.fixture
async def served():
    server, events = Server(1.0), Events()
    event_pb2_grpc.add_EventServiceServicer_to_server(events, server.grpc)
    port = await server.start("127.0.0.1:0", [SERVICE])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield server, events, channel
    await server.drain()


def request(event_id):
    return event_pb2.PublishRequest(events=[event_pb2.Event(event_id=event_id)])


@pytest.mark.parametrize(
    ("event_id", "code"),
    [
        ("bad", grpc.StatusCode.INVALID_ARGUMENT),
        ("corrupt", grpc.StatusCode.DATA_LOSS),
        ("busy", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_errors_become_statuses_with_their_message(served, event_id, code):
    _, _, channel = served
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await event_pb2_grpc.EventServiceStub(channel).Publish(request(event_id))
    assert caught.value.code() is code
    assert caught.value.details() == "Publish: got this; expected that. Mend it."
    pushback = dict(caught.value.trailing_metadata()).get("grpc-retry-pushback-ms")
    assert pushback == ("-1" if code is grpc.StatusCode.RESOURCE_EXHAUSTED else None)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x7f", b"\x0a\x06\x0a\x04\xff\xfe\xfd\xfc"])
async def test_malformed_protobuf_is_invalid_argument(served, data):
    _, _, channel = served
    unary = channel.unary_unary(f"/{SERVICE}/Publish")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await unary(data)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "do not parse" in caught.value.details()
    stream = channel.stream_unary(f"/{SERVICE}/PublishStream")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(iter([data]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_method_is_unimplemented(served):
    _, _, channel = served
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(f"/{SERVICE}/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_one_deadline_from_the_clients_time_capped_or_default(served):
    _, events, channel = served
    stub = event_pb2_grpc.EventServiceStub(channel)
    rounded_ms = 5  # gRPC writes the time left into a header of few digits, rounded up
    for timeout_s, low_ms, high_ms in ((None, 100, 200), (0.5, 300, 500 + rounded_ms), (60, 900, 1_000)):
        await stub.Publish(request("x"), timeout=timeout_s)
        assert low_ms < events.deadline.remaining_ms() <= high_ms


async def test_health_follows_serving_and_drain(served):
    server, _, channel = served
    health = health_pb2_grpc.HealthStub(channel)
    status = health_pb2.HealthCheckResponse

    async def state(service):
        return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

    assert await state("") == await state(SERVICE) == status.NOT_SERVING
    await server.set_serving(True)
    assert await state("") == await state(SERVICE) == status.SERVING


async def test_taken_port_and_bad_address():
    server = Server(1.0)
    port = await server.start("127.0.0.1:0", [])
    with pytest.raises(Unavailable, match=f"--listen 127.0.0.1:{port}"):
        await Server(1.0).start(f"127.0.0.1:{port}", [])
    await server.drain()
    for listen in ("127.0.0.1", "50051", "host:port", ":1", "127.0.0.1:65536", "127.0.0.1:²", "127.0.0.1:-1"):
        with pytest.raises(BadInput, match="--listen"):
            await Server(1.0).start(listen, [])


def test_loopback_is_recognised():
    assert all(map(on_loopback, ("127.0.0.1:1", "localhost:1", "[::1]:1")))
    assert not any(map(on_loopback, ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "gateway:1")))


async def test_pings_do_not_end_a_connection_that_nobody_uses():
    server = Server(1.0)
    port = await server.start("127.0.0.1:0", [])
    often = dict(TO_WORKERS) | {"grpc.keepalive_time_ms": 1_100}  # the third ping too many would be the end
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(often.items())) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(6.0):
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    await server.drain()


async def test_who_takes_connections_and_never_speaks_counts_as_gone():
    """A process that hangs: its kernel takes connections. Calls must not wait for it until their deadlines."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        async with grpc.aio.insecure_channel(target, options=TO_WORKERS) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


class Names(asyncio.DatagramProtocol):
    """A DNS server that knows one name, as of a headless Service: every question for addresses gets `addresses`."""

    def __init__(self) -> None:
        self.addresses = ["127.0.0.1"]

    def connection_made(self, transport):
        self._transport = transport

    def datagram_received(self, data, who):
        end = data.index(b"\0", 12) + 5
        (kind,) = struct.unpack(">H", data[end - 4 : end - 2])
        found = self.addresses if kind == 1 else []
        head = data[:2] + struct.pack(">HHHHH", 0x8180, 1, len(found), 0, 0) + data[12:end]
        answers = (b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(a) for a in found)
        self._transport.sendto(head + b"".join(answers), who)


class Slates(recommend_pb2_grpc.RecommendationServiceServicer):
    def __init__(self, calls, name):
        self._calls, self._name = calls, name

    async def Recommend(self, request, context):  # noqa: N802
        self._calls[self._name] += 1
        return recommend_pb2.RecommendResponse()


async def start_slates(calls, host, port=0):
    server = Server(1.0)
    recommend_pb2_grpc.add_RecommendationServiceServicer_to_server(Slates(calls, host), server.grpc)
    return server, await server.start(f"{host}:{port}", [])


async def test_who_is_added_to_a_name_is_called_soon(monkeypatch):
    """Kubernetes scales out by addresses; a connection that never ends would never hear of them."""
    assert 10_000 <= dict(SERVER)["grpc.max_connection_age_ms"] <= 60_000
    young = dict(SERVER) | {"grpc.max_connection_age_ms": 500}
    monkeypatch.setattr("recsys.serving.server.SERVER", tuple(young.items()))
    calls, loop = collections.Counter(), asyncio.get_running_loop()
    transport, names = await loop.create_datagram_endpoint(Names, local_addr=("127.0.0.1", 0))
    dns = transport.get_extra_info("sockname")[1]
    first, port = await start_slates(calls, "127.0.0.1")
    soon = dict(TO_WORKERS) | {"grpc.dns_min_time_between_resolutions_ms": 100}
    target = f"dns://127.0.0.1:{dns}/gateway.test:{port}"
    async with grpc.aio.insecure_channel(target, options=list(soon.items())) as channel:
        stub = recommend_pb2_grpc.RecommendationServiceStub(channel)
        await stub.Recommend(recommend_pb2.RecommendRequest(), timeout=10)
        second, _ = await start_slates(calls, "127.0.0.2", port)
        names.addresses.append("127.0.0.2")
        async with asyncio.timeout(20):
            while calls["127.0.0.2"] < 20:  # and none of those before fails
                await stub.Recommend(recommend_pb2.RecommendRequest(), timeout=10)
                await asyncio.sleep(0.02)
    await first.drain()
    await second.drain()
    transport.close()


async def test_a_client_goes_round_the_gateways_of_its_target():
    calls = collections.Counter()
    first, port = await start_slates(calls, "127.0.0.1")
    second, other = await start_slates(calls, "127.0.0.2")
    target = f"ipv4:127.0.0.1:{port},127.0.0.2:{other}"
    async with RecommendClient(target) as client:
        await client.recommend("u", deadline_ms=10_000)
        await asyncio.sleep(0.2)  # both are connected
        for i in range(40):
            await client.recommend(f"u{i}", deadline_ms=10_000)
    assert min(calls["127.0.0.1"], calls["127.0.0.2"]) >= 19
    await first.drain()
    await second.drain()


async def test_a_watch_of_health_hears_the_end_and_does_not_delay_it():
    server = Server(30.0)
    port = await server.start("127.0.0.1:0", [SERVICE])
    await server.set_serving(True)
    status = health_pb2.HealthCheckResponse
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == status.SERVING
        async with asyncio.timeout(5):
            await asyncio.gather(server.drain(), heard := asyncio.ensure_future(watch.read()))
        assert heard.result().status == status.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
