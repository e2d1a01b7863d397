"""The rerank worker as a process: ready line, health, reflection, statuses on the wire, drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import grpc
import numpy as np
import psutil
import pytest
from double11.v1 import rerank_pb2 as pb
from double11.v1 import rerank_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from llm_reranker import checkpoint
from llm_reranker.base import RerankRequest, RerankResult
from llm_reranker.client import RemoteReranker
from llm_reranker.config import RerankConfig
from llm_reranker.local import LocalReranker
from llm_reranker.server import RerankServer
from recsys.bench.servers import free_ports
from recsys.core import Deadline, DeadlineExceeded, Unavailable, VersionMismatch
from recsys.core.run_dir import RunDirectory

SERVICE = "double11.v1.RerankService"


@dataclass
class Server:
    process: subprocess.Popen[str]
    target: str
    ready: dict[str, object]


@pytest.fixture(scope="module")
def server(run: RunDirectory) -> Iterator[Server]:
    argv = [sys.executable, "-m", "llm_reranker.server", "--run", str(run.root), "--listen", "127.0.0.1:0"]
    (port,) = free_ports(1)
    environ = {**os.environ, "DOUBLE11__LLM_RERANKER__METRICS_PORT": str(port)}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield Server(process, f"127.0.0.1:{ready['port']}", ready)
        process.kill()


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def request(n: int = 4, **changes: object) -> pb.RerankRequest:
    candidates = [pb.RerankCandidate(item_id=f"item-{i}", features=[0.1, 0.2, i]) for i in range(n)]
    return pb.RerankRequest(**{"request_id": "r1", "candidates": candidates, "as_of_us": 1, **changes})


def status(channel: grpc.Channel, message: pb.RerankRequest, timeout: float = 20) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        pb_grpc.RerankServiceStub(channel).Rerank(message, timeout=timeout)
    return str(caught.value.code().name)  # type: ignore[attr-defined]


def test_it_says_where_it_listens_and_answers(server: Server, channel: grpc.Channel) -> None:
    assert server.ready["ready"] is True
    assert server.ready["version"] == "1"
    response = pb_grpc.RerankServiceStub(channel).Rerank(request(), timeout=20)
    assert (response.request_id, response.depth, response.version) == ("r1", 4, "1")
    assert np.isfinite(response.scores).all()
    assert response.compute_ms > 0


def test_metrics_are_for_this_host_alone(server: Server) -> None:
    port = server.ready["metrics_port"]
    listening = [c.laddr for c in psutil.Process(server.process.pid).net_connections("tcp") if c.status == "LISTEN"]
    assert [at.ip for at in listening if at.port == port] == ["127.0.0.1"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        assert "double11_rerank_queue_ms" in response.read().decode()


def test_health_and_reflection(channel: grpc.Channel) -> None:
    for name in ("", SERVICE):
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_statuses_of_bad_requests(channel: grpc.Channel) -> None:
    assert status(channel, request(10_000)) == "INVALID_ARGUMENT"
    assert status(channel, request(query_text="x" * 513)) == "INVALID_ARGUMENT"
    assert status(channel, request(history=[pb.HistoryEntry(text="围" * 1400)])) == "INVALID_ARGUMENT"
    assert status(channel, request(candidates=[pb.RerankCandidate(item_id="a", features=[1])])) == "INVALID_ARGUMENT"
    assert status(channel, request(version="nope")) == "FAILED_PRECONDITION"
    assert status(channel, request(version="n" * 1_000_000)) == "FAILED_PRECONDITION"  # not all of it comes back
    assert status(channel, request(), timeout=0) == "DEADLINE_EXCEEDED"


def test_bytes_that_are_no_message_are_the_callers_mistake(channel: grpc.Channel) -> None:
    raw = channel.unary_unary(f"/{SERVICE}/Rerank")
    invalid_utf8 = b"\x0a\x02\xff\xfe"  # request_id
    for data in (b"\xff\xff\xff", invalid_utf8):
        with pytest.raises(grpc.RpcError) as caught:
            raw(data, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_no_candidates_give_no_scores(channel: grpc.Channel) -> None:
    response = pb_grpc.RerankServiceStub(channel).Rerank(request(0), timeout=20)
    assert (list(response.scores), response.depth) == ([], 0)


def ask() -> RerankRequest:
    return RerankRequest(
        request_id="r", as_of_us=1, history=[], item_ids=["item-1"], texts=[""], features=np.zeros((1, 3), np.float32)
    )


async def test_the_client_turns_statuses_into_our_errors(server: Server) -> None:
    other = RemoteReranker(server.target, version="2")
    with pytest.raises(VersionMismatch):
        await other.rerank(ask(), Deadline.after_ms(20_000))
    await other.close()
    nobody = RemoteReranker("127.0.0.1:1")
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await nobody.rerank(ask(), Deadline.after_ms(2_000))
    await nobody.close()


class Senseless:
    """A reranker that answers with the depth and the scores it is given."""

    version, feature_names = "1", ("a", "b", "c")

    def __init__(self, scores: list[float], depth: int) -> None:
        self._result = RerankResult(scores=np.array(scores, np.float32), depth=depth, version="1")

    async def rerank(self, _request: RerankRequest, _deadline: Deadline) -> RerankResult:
        return self._result

    async def stop(self) -> None:
        """Nothing to end."""


@pytest.mark.parametrize(
    ("scores", "depth"), [([0.5], 0), ([0.5], 2), ([0.5], -1), ([0.5, 1.0], 1), ([], 1), ([np.nan], 1), ([np.inf], 1)]
)
async def test_an_answer_that_makes_no_sense_is_unavailable(scores: list[float], depth: int) -> None:
    server = RerankServer(Senseless(scores, depth), RerankConfig())
    remote = RemoteReranker(f"127.0.0.1:{await server.start('127.0.0.1:0')}")
    with pytest.raises(Unavailable, match="scores, depth"):
        await remote.rerank(ask(), Deadline.after_ms(20_000))
    await remote.close()
    await server.drain()


async def test_several_workers_are_one_target(run: RunDirectory, world: ModuleType) -> None:
    loaded, config = checkpoint.read(run.root / "reranker/1"), RerankConfig()
    servers = [RerankServer(LocalReranker.of(loaded, world.items(), name, config), config) for name in "ab"]
    ports = [await s.start("127.0.0.1:0") for s in servers]
    remote = RemoteReranker("ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports))
    answered: set[str] = set()
    for _ in range(200):
        answered.add((await remote.rerank(ask(), Deadline.after_ms(20_000))).version)
        if len(answered) == 2:
            break
    assert answered == {"a", "b"}
    await servers[0].drain()
    for _ in range(3):
        assert (await remote.rerank(ask(), Deadline.after_ms(20_000))).version == "b"
    await remote.close()
    await servers[1].drain()


async def test_sigterm_drains_calls_in_flight(server: Server) -> None:
    """Runs last: it ends the server."""
    remote = RemoteReranker(server.target)
    await remote.rerank(ask(), Deadline.after_ms(20_000))
    calls = [asyncio.create_task(remote.rerank(ask(), Deadline.after_ms(20_000))) for _ in range(20)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    server.process.send_signal(signal.SIGTERM)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(not isinstance(r, BaseException) or isinstance(r, Unavailable) for r in results)
    assert await asyncio.to_thread(server.process.wait, 20) == 0
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await remote.rerank(ask(), Deadline.after_ms(2_000))
    await remote.close()


def test_a_run_that_is_not_there_is_a_line_for_people_a_document_for_the_supervisor_and_exit_code_2(
    tmp_path: object,
) -> None:
    argv = [sys.executable, "-m", "llm_reranker.server", "--run", f"{tmp_path}/none"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "double11 train" in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "NOT_FOUND"
    assert "double11 train" in error["fix"]
