"""A real scoring worker process answers as the same models do in this process."""

import asyncio
import json
import signal
import subprocess
import sys

import grpc
import numpy as np
import pytest
from double11.v1 import scoring_pb2, scoring_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from recsys.candidates.ann import LocalAnnSource
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import Deadline, DeadlineExceeded, ManualClock, Query, Unavailable
from recsys.models.ranker import Ranker
from recsys.models.tower import Tower
from recsys.pipeline import Ports, build
from recsys.ranking.score import LocalScorer
from recsys.serving.remote import AnnShard, RemoteAnnSource, RemoteScorer, open_channel


@pytest.fixture(scope="module")
def worker(run):
    process = subprocess.Popen(
        [sys.executable, "-m", "recsys.serving.worker", "--run", str(run.root)], stdout=subprocess.PIPE, text=True
    )
    ready = json.loads(process.stdout.readline())
    assert ready["ready"] is True
    yield f"127.0.0.1:{ready['port']}"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.fixture
async def channel(worker):
    async with open_channel(worker) as opened:
        yield opened


def query(dataset, **fields):
    user_id = dataset.events(types=["purchase"])["user_id"][-1]
    return Query(user_id=user_id, as_of_us=dataset.last_event_us + 1, request_id="r", **fields)


@pytest.mark.parametrize("new_only", [False, True])
async def test_remote_ann_is_local_ann(run, dataset, store, channel, new_only):
    asked = query(dataset, new_only=new_only)
    user = await store.user(asked.user_id, asked.as_of_us, Deadline.never())
    local = await LocalAnnSource(Tower.load(run), LiveIndex(AnnIndex.load(run))).retrieve(
        asked, user, 50, Deadline.never()
    )
    remote = await RemoteAnnSource([AnnShard(channel)]).retrieve(asked, user, 50, Deadline.after_ms(10_000))
    assert remote.item_key.tolist() == local.item_key.tolist()
    np.testing.assert_allclose(remote.scores, local.scores, rtol=1e-5)


async def test_user_without_history_gets_nothing_without_a_call(dataset, store):
    user = await store.user("nobody", dataset.last_event_us, Deadline.never())
    async with open_channel("127.0.0.1:9") as nowhere:
        found = await RemoteAnnSource([AnnShard(nowhere)]).retrieve(query(dataset), user, 5, Deadline.never())
    assert len(found) == 0


async def test_remote_ranker_is_local_ranker(run, dataset, store, channel):
    asked, ranker = query(dataset), Ranker.load(run)
    clock = ManualClock(asked.as_of_us)
    ports = Ports(features=store, clock=clock, rng=np.random.default_rng(0), scorer=LocalScorer(ranker))
    collected = await build("rank", run, ports).collect(asked, Deadline.never())
    args = asked, collected.user, collected.candidates, collected.features
    scorer = RemoteScorer([channel], "unknown yet")
    remote = await scorer.score(*args, Deadline.after_ms(10_000))
    np.testing.assert_allclose(remote, await LocalScorer(ranker).score(*args, Deadline.never()), rtol=1e-5)
    assert scorer.version == ranker.version == run.manifest["files"]["models/ranker.safetensors"]["sha256"][:12]


async def test_no_time_left_and_no_worker(run, dataset, store, channel):
    asked = query(dataset)
    user = await store.user(asked.user_id, asked.as_of_us, Deadline.never())
    with pytest.raises(DeadlineExceeded):
        await RemoteAnnSource([AnnShard(channel)]).retrieve(asked, user, 5, Deadline.after_ms(0))
    async with open_channel("127.0.0.1:9") as nowhere:
        with pytest.raises(Unavailable):
            await RemoteAnnSource([AnnShard(nowhere)]).retrieve(asked, user, 5, Deadline.after_ms(2_000))


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Retrieve", scoring_pb2.RetrieveRequest(limit=0)),
        ("Retrieve", scoring_pb2.RetrieveRequest(limit=10_001)),
        ("Retrieve", scoring_pb2.RetrieveRequest(limit=5, history_keys=[1], history_types=[1, 2])),
        ("Retrieve", scoring_pb2.RetrieveRequest(limit=5, history_keys=[1] * 513)),
        ("Rank", scoring_pb2.RankRequest(feature_names=["a"], item_keys=[1], features_f32=b"123")),
    ],
)
async def test_requests_out_of_limits_are_refused(channel, method, request_):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(scoring_pb2_grpc.ScoringServiceStub(channel), method)(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_features_of_another_release_are_a_version_mismatch(channel):
    request = scoring_pb2.RankRequest(feature_names=["shoe_size"], item_keys=[1], features_f32=b"\0" * 4)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await scoring_pb2_grpc.ScoringServiceStub(channel).Rank(request)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_worker_is_healthy(channel):
    health = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service="double11.v1.ScoringService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_many_calls_at_once_are_all_answered(dataset, store, channel):
    asked = query(dataset)
    user = await store.user(asked.user_id, asked.as_of_us, Deadline.never())
    source = RemoteAnnSource([AnnShard(channel)])
    found = await asyncio.gather(*(source.retrieve(asked, user, 20, Deadline.after_ms(20_000)) for _ in range(50)))
    assert {tuple(f.item_key.tolist()) for f in found} == {tuple(found[0].item_key.tolist())}


def test_worker_without_a_run_says_so_and_exits_2(tmp_path):
    command = [sys.executable, "-m", "recsys.serving.worker", "--run", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "no manifest.json" in done.stderr
    assert "Traceback" not in done.stderr
