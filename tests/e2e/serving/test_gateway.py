"""The gateway as storefronts and operators meet it: real processes, real run, real store, over the wire."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
import urllib.request

import grpc
import pytest
from double11.v1 import event_pb2, event_pb2_grpc, recommend_pb2, recommend_pb2_grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from serving_world import TOML, double11

from recsys.bench.servers import free_ports
from recsys.core import BadInput, NotFound
from recsys.load import LoadPlan
from recsys.load import run as run_load
from recsys.serving import ClientConfig, RecommendClient
from recsys.serving.client import AdminClient
from streaming.codec import decode_events, decode_impressions
from streaming.log import open_log
from streaming.log.base import read_all

EVENT_US = 1_762_905_000_000_000


@pytest.fixture(scope="module")
def gateway(serve):
    return serve("--no-writer")


@pytest.fixture
async def client(gateway):
    async with RecommendClient(gateway.target, ClientConfig(throttle_ratio=0)) as opened:
        yield opened


@pytest.fixture
async def channel(gateway):
    async with grpc.aio.insecure_channel(gateway.target) as opened:
        yield opened


def records(gateway, topic):
    with open_log(f"embedded:{gateway.folder}") as log:
        return [value for batch in read_all(log, topic) for value in batch.values]


def impressions(gateway):
    return [event_pb2.Impression.FromString(v) for v in records(gateway, "impressions")]


async def until(found, timeout_s=20.0):
    async with asyncio.timeout(timeout_s):
        while not (result := found()):
            await asyncio.sleep(0.05)
    return result


def test_whoever_serves_a_run_may_read_its_files(run):
    plain = (run.root / "manifest.json").stat().st_mode  # what the umask of the one who trains gives
    assert {n for n in run.manifest["files"] if run.path(n).stat().st_mode != plain} == set()


async def test_slate_has_tier_timings_versions_titles_and_an_impression(gateway, client, run, shoppers):
    request = recommend_pb2.RecommendRequest(
        user_id=shoppers[0], limit=12, request_id="slate-1", surface="home", session_id="s-1"
    )
    slate = await client.call(request, deadline_ms=5_000)
    assert slate.request_id == "slate-1"
    assert slate.tier == recommend_pb2.TIER_FULL
    assert not slate.fallbacks
    assert len({i.item_id for i in slate.items}) == 12
    assert all(i.title and i.sources and 0 < i.propensity <= 1 for i in slate.items)
    assert [i.score for i in slate.items] == sorted((i.score for i in slate.items), reverse=True)
    assert slate.versions["run"] == run.run_id
    assert slate.versions["ranker"] == run.manifest["files"]["models/ranker.safetensors"]["sha256"][:12]
    assert {"user", "ann", "hydrate", "rank", "rerank", "select"} <= {t.stage for t in slate.timings}
    assert {t.outcome for t in slate.timings} == {"ok"}
    shown = await until(lambda: [i for i in impressions(gateway) if i.request_id == "slate-1"])
    assert len(shown) == 1
    assert (shown[0].user_id, shown[0].surface, shown[0].session_id) == (shoppers[0], "home", "s-1")
    assert (shown[0].run_id, shown[0].tier) == (run.run_id, recommend_pb2.TIER_FULL)
    assert [(i.item_id, i.position) for i in shown[0].items] == [
        (i.item_id, place) for place, i in enumerate(slate.items, start=1)
    ]
    decoded = decode_impressions([shown[0].SerializeToString()])
    assert not decoded.rejected
    assert len(decoded.batch) == 12


def test_client_made_from_reflection_alone_gets_a_slate(gateway, shoppers):
    with grpc.insecure_channel(gateway.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"double11.v1.RecommendationService", "double11.v1.EventService", "double11.v1.AdminService"} <= set(
            database.get_services()
        )
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("double11.v1.RecommendationService").FindMethodByName("Recommend")
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        assert request_class is not recommend_pb2.RecommendRequest
        call = channel.unary_unary(
            "/double11.v1.RecommendationService/Recommend",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=response_class.FromString,
        )
        slate = MessageToDict(call(request_class(user_id=shoppers[0], limit=5), timeout=10))
    assert slate["tier"] == "TIER_FULL"
    assert len(slate["items"]) == 5


def test_gateway_process_is_free_of_torch_faiss_and_transformers():
    code = (
        "import sys, recsys.serving.gateway, recsys.cli.serve, recsys.cli.admin, recsys.cli.load\n"
        "from recsys.core.config import Config; Config.load()\n"
        "heavy = {'torch', 'torchrec', 'faiss', 'transformers', 'fbgemm_gpu'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_running_gateway_never_loaded_them_either(gateway, client, shoppers):
    await client.recommend(shoppers[0], deadline_ms=5_000)
    with open(f"/proc/{gateway.process.pid}/maps") as maps:
        loaded = maps.read()
    assert "libgrpc" in loaded or "cygrpc" in loaded
    assert "libtorch" not in loaded
    assert "faiss" not in loaded


async def test_unknown_user_and_zero_limit_get_a_newcomers_slate(client):
    slate = await client.recommend("nobody has seen me", limit=0, deadline_ms=5_000)
    assert len(slate.items) == 10
    assert slate.tier == recommend_pb2.TIER_FULL


async def test_unknown_items_in_the_context_are_no_error(client, shoppers):
    context = recommend_pb2.Context(
        current_item_id="never listed", cart_item_ids=["nor this", "购物车"], query_text="?"
    )
    request = recommend_pb2.RecommendRequest(user_id=shoppers[0], context=context, exclude_item_ids=["nor that"])
    slate = await client.call(request, deadline_ms=5_000)
    assert len(slate.items) == 10
    assert slate.tier == recommend_pb2.TIER_FULL


async def test_exclusions_and_new_only_are_kept(client, dataset, shoppers):
    first = await client.recommend(shoppers[0], deadline_ms=5_000)
    banned = [i.item_id for i in first.items[:5]]
    second = await client.recommend(shoppers[0], exclude=banned, deadline_ms=5_000)
    assert not {i.item_id for i in second.items} & set(banned)
    fresh = await client.recommend(shoppers[0], new_only=True, deadline_ms=5_000)
    events = dataset.events(types=["view", "favorite", "cart", "purchase", "return"])
    seen = set(events.filter(events["user_id"] == shoppers[0])["item_id"])
    assert not {i.item_id for i in fresh.items} & seen


async def test_limit_of_500_is_more_than_the_shop_has_and_501_is_refused(client, shoppers):
    slate = await client.recommend(shoppers[0], limit=500, deadline_ms=10_000)
    assert 0 < len(slate.items) <= 300
    with pytest.raises(BadInput, match="limit: got 501; expected 0 to 500"):
        await client.recommend(shoppers[0], limit=501)


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"])
async def test_malformed_protobuf_is_invalid_argument(channel, data):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/double11.v1.RecommendationService/Recommend")(data, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_deadline_that_the_server_finds_expired_is_deadline_exceeded(channel, shoppers):
    """The timeout is sent as a header of our own: the client keeps no clock, so it is the server that answers."""
    stub = recommend_pb2_grpc.RecommendationServiceStub(channel)
    request = recommend_pb2.RecommendRequest(user_id=shoppers[0])
    # gRPC rounds up to a whole millisecond, in which a lower tier may still answer.
    codes = {await stub.Recommend(request, metadata=(("grpc-timeout", "1n"),)).code() for _ in range(50)}
    assert grpc.StatusCode.DEADLINE_EXCEEDED in codes
    assert codes <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.OK}
    assert len((await stub.Recommend(request, metadata=(("grpc-timeout", "5S"),))).items) == 10


async def test_without_a_deadline_the_default_applies(channel, shoppers):
    stub = recommend_pb2_grpc.RecommendationServiceStub(channel)
    slate = await stub.Recommend(recommend_pb2.RecommendRequest(user_id=shoppers[0]))
    assert len(slate.items) == 10


async def test_overload_is_refused_without_retry(gateway, shoppers):
    request = recommend_pb2.RecommendRequest(user_id=shoppers[0], limit=100)
    async with grpc.aio.insecure_channel(gateway.target) as channel:
        stub = recommend_pb2_grpc.RecommendationServiceStub(channel)
        calls = [stub.Recommend(request, timeout=10) for _ in range(200)]
        codes = [await call.code() for call in calls]
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        refused = calls[codes.index(grpc.StatusCode.RESOURCE_EXHAUSTED)]
        assert ("grpc-retry-pushback-ms", "-1") in tuple(await refused.trailing_metadata())


async def test_published_events_are_durable_when_acknowledged(gateway, channel, shoppers):
    stub = event_pb2_grpc.EventServiceStub(channel)
    action = event_pb2.Action(type=event_pb2.ACTION_TYPE_CART, user_id=shoppers[0], item_id="i000001")
    good = event_pb2.Event(event_id="published-1", event_time_us=EVENT_US, action=action)
    stock = event_pb2.StockChange(item_id="i000001", stock_units=3)
    other = event_pb2.Event(event_id="published-2", event_time_us=EVENT_US, stock=stock, stress=True)
    bad = event_pb2.Event(event_id="published-3", event_time_us=-1, action=action)
    answer = await stub.Publish(event_pb2.PublishRequest(events=[good, bad, other]), timeout=10)
    assert answer.accepted == 2
    assert [(r.index, r.event_id) for r in answer.rejected] == [(1, "published-3")]
    assert "event_time_us -1" in answer.rejected[0].reason
    ids = decode_events(records(gateway, "events")).batch.strings("event_id")
    assert "published-1" in ids
    assert "published-3" not in ids
    assert "published-2" in decode_events(records(gateway, "catalog")).batch.strings("event_id")


async def test_publish_stream_and_its_limits(gateway, channel):
    stub = event_pb2_grpc.EventServiceStub(channel)

    def event(i, user_id="u"):
        action = event_pb2.Action(type=event_pb2.ACTION_TYPE_VIEW, user_id=user_id, item_id="i000002")
        return event_pb2.Event(event_id=f"streamed-{i}", event_time_us=EVENT_US, action=action)

    chunks = [[event(i) for i in range(c * 100, c * 100 + 100)] for c in range(3)]
    chunks.append([event(300, user_id="")])
    answer = await stub.PublishStream(iter([event_pb2.PublishStreamRequest(events=c) for c in chunks]), timeout=20)
    assert (answer.accepted, answer.rejected_total) == (300, 1)
    assert answer.rejected[0].index == 300
    ids = decode_events(records(gateway, "events")).batch.strings("event_id")
    assert {f"streamed-{i}" for i in range(300)} <= set(ids)
    many = event_pb2.PublishRequest(events=[event(0)] * 1_001)
    large = event_pb2.Event(item=event_pb2.ItemChange(title="x" * (1 << 20)))
    for request, message in ((many, "1001 events"), (event_pb2.PublishRequest(events=[large]), "bytes")):
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            await stub.Publish(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_peak_plan_changes_tier_and_limit_at_once_and_back(gateway, client, shoppers):
    async with AdminClient(gateway.target) as admin:
        plans = await admin.peak()
        assert ({p.name for p in plans.plans}, plans.active) == ({"calm", "midnight"}, "")
        with pytest.raises(NotFound, match="calm, midnight"):
            await admin.activate("storm")
        await admin.activate("calm")
        status = await admin.status()
        assert (status.peak_plan, status.in_flight_limit) == ("calm", 2)
        lowered = await client.recommend(shoppers[0], deadline_ms=5_000)
        assert (lowered.tier, list(lowered.fallbacks)) == (recommend_pb2.TIER_RETRIEVAL, ["peak:calm"])
        await admin.activate("midnight")
        assert (await client.recommend(shoppers[0], deadline_ms=5_000)).tier == recommend_pb2.TIER_POPULAR
        assert (await admin.revert()).reverted == "midnight"
        status = await admin.status()
        assert (status.peak_plan, status.in_flight_limit) == ("", 4)
        assert (await client.recommend(shoppers[0], deadline_ms=5_000)).tier == recommend_pb2.TIER_FULL


async def test_a_configured_peak_plan_is_in_force_from_the_start(serve, shoppers):
    gateway = serve("--arm", "own_history", "--no-writer", toml=f'{TOML}\n[serving.peak]\nactive = "midnight"\n')
    async with AdminClient(gateway.target) as admin, RecommendClient(gateway.target) as client:
        assert (await admin.peak()).active == "midnight"
        lowered = await client.recommend(shoppers[0], deadline_ms=5_000)
        assert (lowered.tier, list(lowered.fallbacks)) == (recommend_pb2.TIER_POPULAR, ["peak:midnight"])
        assert (await admin.revert()).reverted == "midnight"
        assert (await client.recommend(shoppers[0], deadline_ms=5_000)).tier == recommend_pb2.TIER_RETRIEVAL


async def test_peak_plan_is_of_the_run_that_serves_whatever_lies_in_its_folder_now(serve, run, tmp_path, shoppers):
    """As after `train --out RUN --replace` while it serves."""
    served = shutil.copytree(run.root, tmp_path / "run")
    gateway = serve("--arm", "rank", "--no-reranker", "--no-writer", run_path=served)
    served.rename(tmp_path / "gone")
    async with AdminClient(gateway.target) as admin, RecommendClient(gateway.target) as client:
        before = await client.recommend(shoppers[0], deadline_ms=5_000)
        await admin.activate("calm")
        lowered = await client.recommend(shoppers[0], deadline_ms=5_000)
        assert (lowered.tier, list(lowered.fallbacks)) == (recommend_pb2.TIER_RETRIEVAL, ["peak:calm"])
        assert set(lowered.versions) == set(before.versions) - {"ranker"}
        await admin.revert()
        after = await client.recommend(shoppers[0], deadline_ms=5_000)
    assert (after.tier, after.versions) == (before.tier, before.versions) == (recommend_pb2.TIER_RANK, before.versions)
    assert [i.item_id for i in after.items] == [i.item_id for i in before.items]


def test_commands_for_people(gateway, shoppers):
    table = double11("recommend", "--target", gateway.target, "--user", shoppers[0])
    assert table.returncode == 0, table.stderr
    assert "tier      full" in table.stdout
    assert "own_history" in table.stdout
    document = json.loads(double11("recommend", "--target", gateway.target, "--user", "u", "--json").stdout)
    assert len(document["items"]) == 10
    status = json.loads(double11("status", "--target", gateway.target, "--json").stdout)
    assert status["state"] == "serving"
    assert {p["name"]: p["state"] for p in status["parts"]} == {
        "scoring-0": "ok",
        "rerank": "ok",
        "store": "ok",
        "ranker": "ok",
        "reranker": "ok",
        "index-shard-0/1": "ok",
        "catalog": "ok",
        "indexes": "ok",
    }
    refused = double11("recommend", "--target", gateway.target, "--user", "u", "--limit", "501", "--json")
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["error"]["code"] == "BAD_INPUT"
    unknown = double11("peak", "activate", "storm", "--target", gateway.target)
    assert unknown.returncode == 2
    assert double11("status", "--target", "127.0.0.1:9").returncode == 4


async def test_open_loop_load_reports_what_came_back(gateway, shoppers):
    plan = LoadPlan(
        target=gateway.target, shape="const", rate_per_s=20, duration_s=3, deadline_ms=2_000, seed=1, stress=True
    )
    report = await run_load(plan, shoppers)
    assert report["requests"] == sum(report["statuses"].values()) > 30
    assert report["statuses"].get("OK", 0) > 0
    assert report["latency_ms"]["p99"] > 0
    assert report["stress"] is True
    assert await until(lambda: any(i.stress for i in impressions(gateway)))


def test_metrics_over_http(serve):
    (port,) = free_ports(1)
    gateway = serve("--arm", "own_history", "--no-writer", toml=f"[serving]\nmetrics_port = {port}\n")
    double11("recommend", "--target", gateway.target, "--user", "nobody")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    assert 'double11_requests_total{status="OK",tier="retrieval"} 1.0' in text
    assert gateway.stop() == 0


def test_load_command_writes_its_report(gateway, tmp_path, shoppers):
    (tmp_path / "users.txt").write_text("\n".join(shoppers))
    args = ["--target", gateway.target, "--shape", "step", "--rate", "2", "--duration", "3"]
    done = double11(
        "stress", *args, "--users", str(tmp_path / "users.txt"), "--out", str(tmp_path / "r" / "report.json")
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["stress"] is True
    assert report["shape"] == "step"


async def test_health_then_sigterm_drains_and_flushes(serve, shoppers):
    gateway = serve("--arm", "own_history", "--no-writer")
    async with grpc.aio.insecure_channel(gateway.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "double11.v1.RecommendationService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = recommend_pb2_grpc.RecommendationServiceStub(channel)
        calls = [
            stub.Recommend(recommend_pb2.RecommendRequest(user_id=u, request_id=f"last-{i}"), timeout=10)
            for i, u in enumerate(shoppers[:4])
        ]
        await asyncio.gather(*calls)
        began_s = time.monotonic()
        assert await asyncio.to_thread(gateway.stop) == 0
        assert time.monotonic() - began_s < 15
    assert {f"last-{i}" for i in range(4)} <= {i.request_id for i in impressions(gateway)}
    assert "Traceback" not in (gateway.folder / "stderr.txt").read_text()


def test_supervised_writer_makes_published_events_visible(serve):
    gateway = serve("--arm", "own_history")
    item = "i000003"
    with grpc.insecure_channel(gateway.target) as channel:
        action = event_pb2.Action(type=event_pb2.ACTION_TYPE_PURCHASE, user_id="just arrived", item_id=item)
        event = event_pb2.Event(event_id="first-purchase", event_time_us=EVENT_US, action=action)
        answer = event_pb2_grpc.EventServiceStub(channel).Publish(event_pb2.PublishRequest(events=[event]), timeout=10)
        assert answer.accepted == 1
        stub = recommend_pb2_grpc.RecommendationServiceStub(channel)
        for _ in range(200):
            slate = stub.Recommend(recommend_pb2.RecommendRequest(user_id="just arrived"), timeout=5)
            if [i.item_id for i in slate.items] == [item]:
                break
            time.sleep(0.05)
        assert [(i.item_id, i.reason) for i in slate.items] == [(item, "bought-before")]
    assert gateway.stop() == 0
