"""What breaks around a gateway costs a tier, never the answer; what is wrong at the start is said and exits."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import time
from contextlib import closing

import grpc
import psutil
import pytest
from certificates import Authority
from double11.v1 import recommend_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis_world import Server
from serving_world import TOML, double11

from recsys.bench.servers import free_ports
from recsys.serving import ClientConfig, RecommendClient
from recsys.serving.client import AdminClient
from recsys.training.promote import promote


@pytest.fixture(scope="module")
def gateway(serve):
    return serve("--no-writer")


@pytest.fixture
async def client(gateway):
    async with RecommendClient(gateway.target, ClientConfig(throttle_ratio=0)) as opened:
        yield opened


async def until_whole(client, user):
    """The first slate of tier full with nothing fallen through."""
    async with asyncio.timeout(60):
        while True:
            slate = await client.recommend(user, deadline_ms=2_000)
            if slate.tier == pb.TIER_FULL and not slate.fallbacks:
                return slate
            await asyncio.sleep(0.1)


async def until_part(admin, name, state):
    """The part once status says so: a call fails as soon as a socket closes, status changes when the exit is known."""
    async with asyncio.timeout(20):
        while True:
            part = next(p for p in (await admin.status()).parts if p.name == name)
            if part.state == state:
                return part
            await asyncio.sleep(0.02)


async def test_scoring_worker_killed_falls_to_retrieval_and_comes_back(gateway, client, shoppers):
    await until_whole(client, shoppers[0])
    os.kill(gateway.child_pid("scoring-0"), signal.SIGKILL)
    slates = await asyncio.gather(*(client.recommend(u, deadline_ms=2_000) for u in shoppers[:3]))
    for slate in slates:
        assert slate.tier == pb.TIER_RETRIEVAL
        assert {"ann:unavailable", "rank:unavailable"} <= set(slate.fallbacks)
        assert len(slate.items) == 10
    async with AdminClient(gateway.target) as admin:
        died = await until_part(admin, "scoring-0", "down")
        assert "code -9" in died.detail
        await until_part(admin, "rerank", "ok")
        await until_whole(client, shoppers[0])
        for part in (await admin.status()).parts:
            await until_part(admin, part.name, "ok")


async def test_a_writer_that_dies_says_why(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gateway = serve("--arm", "own_history", toml=f"[streaming.job]\nmetrics_port = {taken.getsockname()[1]}\n")
        async with AdminClient(gateway.target) as admin:
            died = await until_part(admin, "writer", "down")
    assert "Address already in use" in died.detail


async def test_rerank_worker_killed_falls_to_rank_and_comes_back(gateway, client, shoppers):
    full = await until_whole(client, shoppers[0])
    assert full.versions["reranker"] == "1"
    assert "rerank" in full.items[0].stage_scores
    os.kill(gateway.child_pid("rerank"), signal.SIGKILL)
    slate = await client.recommend(shoppers[0], deadline_ms=2_000)
    assert slate.tier == pb.TIER_RANK
    assert slate.fallbacks == ["rerank:unavailable"]
    assert len(slate.items) == 10
    await until_whole(client, shoppers[0])


async def test_stalled_scoring_worker_costs_its_share_of_the_deadline_only(gateway, client, shoppers):
    await until_whole(client, shoppers[0])
    pid = gateway.child_pid("scoring-0")
    os.kill(pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        slate = await client.recommend(shoppers[0], deadline_ms=1_000)
        assert time.monotonic() - began_s < 1.0
        assert slate.tier == pb.TIER_RETRIEVAL
        assert {"ann:timeout", "rank:timeout"} <= set(slate.fallbacks)
        async with AdminClient(gateway.target) as admin:  # its process is there
            parts = {p.name: p for p in (await admin.status()).parts}
        assert {n for n, p in parts.items() if p.state != "ok"} == {"ranker", "index-shard-0/1"}
        assert "DEADLINE_EXCEEDED" in parts["index-shard-0/1"].detail
        assert " s: rank: " in parts["ranker"].detail
    finally:
        os.kill(pid, signal.SIGCONT)
    await until_whole(client, shoppers[0])
    async with AdminClient(gateway.target) as admin:
        assert {p.state for p in (await admin.status()).parts} == {"ok"}


async def test_a_store_and_workers_elsewhere_that_do_not_answer_are_named(serve, tmp_path):
    (nobody,), redis = free_ports(1), Server(tmp_path / "redis")
    toml = TOML.replace('clock = "data"', "").replace("[serving]", f'[serving]\nscoring_target = "127.0.0.1:{nobody}"')
    flags = ("--arm", "rank", "--no-reranker", "--no-writer", "--store", redis.url, "--log", f"embedded:{tmp_path}")
    with closing(redis):
        gateway, pid = serve(*flags, toml=toml), redis.client.info("server")["process_id"]
        async with RecommendClient(gateway.target) as client, AdminClient(gateway.target) as admin:

            async def wrong():
                slate = await client.recommend("nobody has seen me", deadline_ms=1_000)
                return slate, {p.name: p.detail for p in (await admin.status()).parts if p.state == "down"}

            slate, parts = await wrong()
            assert slate.fallbacks == ["rank:unavailable"]
            assert parts.keys() == {"ranker", "index-shard-0/1"}
            assert "rank: scoring worker, Rank: got UNAVAILABLE" in parts["ranker"]
            os.kill(pid, signal.SIGSTOP)
            slate, parts = await wrong()
            os.kill(pid, signal.SIGCONT)
            assert slate.fallbacks == ["user:timeout"]
            assert " s: user: " in parts["store"]
            async with asyncio.timeout(60):
                while "store" in (await wrong())[1]:
                    await asyncio.sleep(0.05)


async def test_a_worker_that_hangs_is_left_alone_until_it_answers_again(serve, shoppers):
    gateway = serve("--no-writer", "--no-reranker", "--workers", "2")
    async with RecommendClient(gateway.target, ClientConfig(throttle_ratio=0)) as client:

        async def asked():
            slates = [await client.recommend(user, deadline_ms=1_000) for user in shoppers[:6]]
            return [fallback for slate in slates for fallback in slate.fallbacks]

        async def until_none_falls_back():
            async with asyncio.timeout(60):
                while await asked():
                    await asyncio.sleep(0.1)

        await until_none_falls_back()
        pid = gateway.child_pid("scoring-0")
        os.kill(pid, signal.SIGSTOP)
        try:
            # Calls take turns and nobody knows yet: it gets every other one, be that ann's or rank's.
            assert {"ann:timeout", "rank:timeout"} & set(await asked())
            await until_none_falls_back()
            assert not await asked()
        finally:
            os.kill(pid, signal.SIGCONT)
        await until_none_falls_back()


def test_killed_gateway_takes_its_children_along(serve):
    gateway = serve("--arm", "own_history")
    children = psutil.Process(gateway.process.pid).children(recursive=True)
    assert children
    gateway.stop(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_sigterm_while_workers_load_stops_at_once(serve):
    gateway = serve("--arm", "rank", "--no-writer", wait=False)
    for _ in range(300):
        if "event=child_started" in gateway.errors():
            break
        time.sleep(0.05)
    began_s = time.monotonic()
    assert gateway.stop() == 0
    assert time.monotonic() - began_s < 10


def test_missing_run_says_how_to_make_one(tmp_path):
    done = double11("serve", "--run", str(tmp_path / "absent"), "--store", f"embedded:{tmp_path}")
    assert done.returncode == 2
    assert "double11 train" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_run_the_promoted_one_is_served_and_named_when_there_is_none(tmp_path, run, monkeypatch):
    monkeypatch.setenv("DOUBLE11_HOME", str(tmp_path / "home"))
    done = double11("serve", "--listen", "nowhere")
    assert done.returncode == 2
    assert "double11 promote RUN" in done.stderr
    promote(run.root)
    done = double11("serve", "--arm", "own_history", "--no-writer", "--listen", "nowhere")
    assert "--listen: got nowhere" in done.stderr


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_corrupt_run_is_refused_before_anything_starts(tmp_path, run, damage):
    broken = tmp_path / "run"
    shutil.copytree(run.root, broken)
    file = broken / "models" / "ranker.safetensors"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "remove":
        file.unlink()
    else:
        (broken / "manifest.json").write_text("{half", "utf-8")
    done = double11("serve", "--run", str(broken), "--store", f"embedded:{tmp_path}")
    assert done.returncode == 1
    assert "Train again, or copy the run directory whole" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--arm", "best"], 2, "--arm: got best"),
        (["--listen", "nowhere"], 2, "--listen: got nowhere"),
        (["--store", "ftp://x"], 2, "store URL"),
        (["--config", "absent.toml"], 2, "absent.toml"),
        (["--workers", "0"], 2, "--workers"),
    ],
)
def test_bad_flags_are_refused(tmp_path, run, args, code, message):
    given = ["--run", str(run.root), "--arm", "own_history", "--no-writer", "--store", f"embedded:{tmp_path}", *args]
    done = double11("serve", *given)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_taken_port_is_unavailable(serve, run, tmp_path):
    gateway = serve("--arm", "own_history", "--no-writer")
    args = ["--run", str(run.root), "--arm", "own_history", "--no-writer", "--store", f"embedded:{tmp_path}"]
    done = double11("serve", *args, "--listen", gateway.target)
    assert done.returncode == 4
    assert f"--listen {gateway.target}" in done.stderr


def test_a_gateway_waits_for_a_store_that_is_away_when_it_starts(serve, tmp_path, shoppers):
    redis = Server(tmp_path / "redis")
    redis.kill()
    flags = ("--arm", "own_history", "--no-writer", "--store", redis.url, "--log", f"embedded:{tmp_path}")
    try:
        gateway = serve(*flags, wait=False)
        deadline_s = time.monotonic() + 60
        while "event=start_refused" not in gateway.errors():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        redis.start()
        gateway.wait_ready()
        assert double11("recommend", "--target", gateway.target, "--user", shoppers[0]).returncode == 0
        assert gateway.errors().count("event=start_refused") == 1
    finally:
        redis.stop()


def test_a_store_that_stays_away_ends_the_start_with_its_reason(run, tmp_path):
    (port,) = free_ports(1)
    (tmp_path / "double11.toml").write_text("[serving]\nstart_s_max = 1\n")
    args = ["--run", str(run.root), "--arm", "own_history", "--no-writer", "--log", f"embedded:{tmp_path}"]
    done = double11("serve", *args, "--store", f"redis://127.0.0.1:{port}", "--config", str(tmp_path / "double11.toml"))
    assert done.returncode == 4
    assert f"redis://127.0.0.1:{port}: got " in done.stderr
    assert "Traceback" not in done.stderr


def test_admin_has_a_loopback_listener_of_its_own_when_the_main_one_is_public(serve):
    toml = '[serving]\nadmin_listen = "127.0.0.1:0"\n'
    gateway = serve("--arm", "own_history", "--no-writer", "--listen", "0.0.0.0:0", "--plain-text", toml=toml)
    assert gateway.ready["admin_port"] != gateway.ready["port"]
    assert double11("status", "--target", gateway.target).returncode != 0
    status = double11("status", "--target", f"127.0.0.1:{gateway.ready['admin_port']}", "--json")
    assert json.loads(status.stdout)["state"] == "serving"


def test_a_public_gateway_proves_who_it_is_and_asks_who_calls(serve, run, shoppers, tmp_path):
    authority = Authority(tmp_path)
    (cert, key), (mine, my_key) = authority.issue("gateway"), authority.issue("storefront")
    (health,) = free_ports(1)
    toml = f"""
[serving]
admin_listen = "127.0.0.1:0"
health_listen = "127.0.0.1:{health}"
[serving.tls]
cert_file = "{cert}"
key_file = "{key}"
client_ca_file = "{authority.ca_file}"
"""
    gateway = serve("--arm", "own_history", "--no-writer", "--listen", "0.0.0.0:0", toml=toml)
    (tmp_path / "client.toml").write_text(
        f'[serving.client]\nca_file = "{authority.ca_file}"\ncert_file = "{mine}"\nkey_file = "{my_key}"\n'
    )
    known = ["--config", str(tmp_path / "client.toml"), "--json"]
    slate = double11("recommend", "--target", gateway.target, "--user", shoppers[0], *known)
    assert json.loads(slate.stdout)["items"], slate.stderr
    status = double11(
        "status", "--target", f"127.0.0.1:{gateway.ready['admin_port']}", "--json"
    )  # never leaves the host
    assert json.loads(status.stdout)["state"] == "serving"
    assert double11("recommend", "--target", gateway.target, "--user", shoppers[0]).returncode == 4
    with grpc.insecure_channel(f"127.0.0.1:{health}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    args = ["--run", str(run.root), "--arm", "own_history", "--no-writer", "--store", f"embedded:{tmp_path / 'home'}"]
    refused = double11("serve", *args, "--listen", "0.0.0.0:0")
    assert refused.returncode == 2
    assert "plain_text_beyond_loopback" in refused.stderr


def test_a_watch_of_one_listener_does_not_keep_the_others_open(serve):
    """A drain that went from one listener to the next took calls for another `drain_s_max`, then dropped them."""
    (health,) = free_ports(1)
    toml = f'[serving]\nhealth_listen = "127.0.0.1:{health}"\ndrain_s_max = 20\n'
    gateway = serve("--arm", "own_history", "--no-writer", toml=toml)
    with grpc.insecure_channel(f"127.0.0.1:{health}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        began_s = time.monotonic()
        assert gateway.stop() == 0
        assert time.monotonic() - began_s < 10
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_worker_that_cannot_load_ends_the_start_with_its_reason(tmp_path, run):
    """Its hashes are right, so the gateway lets it pass; what is in it does not fit."""
    broken = tmp_path / "run"
    shutil.copytree(run.root, broken)
    file, manifest = broken / "models" / "ranker.json", json.loads((broken / "manifest.json").read_text())
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"feature_names": facts["feature_names"][:-1]}))
    content = file.read_bytes()
    manifest["files"]["models/ranker.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (broken / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "double11.toml").write_text("[serving]\nrestart_backoff_s_min = 0.1\n")
    began_s = time.monotonic()
    args = ["--run", str(broken), "--arm", "rank", "--no-writer", "--store", f"embedded:{tmp_path / 'home'}"]
    done = double11("--log-level", "warning", "serve", *args, "--config", str(tmp_path / "double11.toml"))
    assert done.returncode == 4, done.stderr
    assert "worker scoring-0: got exited with code 1, restart 1" in done.stderr
    assert "expected the weights of its settings" in done.stderr
    assert "event=child_started" not in done.stderr  # info, which was not asked for
    assert time.monotonic() - began_s < 100  # of 120 that it would have waited


def test_log_level_reaches_the_children(serve):
    quiet = serve("--arm", "rank", "--no-reranker", log_level="error")
    children = psutil.Process(quiet.process.pid).children(recursive=True)
    levels = [c.cmdline()[c.cmdline().index("--log-level") + 1] for c in children]
    assert levels == ["error"] * 2  # scoring-0 and the writer
    assert quiet.errors() == ""
