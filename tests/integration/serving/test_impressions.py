"""An impression is a slate that was sent to somebody: callers that hung up or ran out of time have seen nothing."""

import asyncio
import time

import grpc
import pyarrow as pa
import pytest
from double11.v1 import event_pb2
from double11.v1 import recommend_pb2 as pb
from double11.v1 import recommend_pb2_grpc as pb_grpc

from recsys.core import ManualClock, Query, Slate, SlateItem, Tier, keys, metrics
from recsys.core.items import ItemTable
from recsys.ranking.catalogue import Catalogue
from recsys.serving.admission import Admission
from recsys.serving.config import AdmissionConfig, ServingConfig
from recsys.serving.impressions import Impressions, impression
from recsys.serving.log_writer import LogWriter
from recsys.serving.recommend_service import InForce, RecommendService
from recsys.serving.server import Server
from streaming.codec import decode_impressions
from streaming.log import open_log
from streaming.log.base import read_all

ITEMS = ItemTable.from_table(pa.table({"item_id": ["i"], "item_key": keys(["i"])}))
SLATE_S = 0.3


class Busy:
    """A cascade that takes its time: `blocking` holds the event loop, so that nobody notices a caller who goes."""

    def __init__(self, blocking):
        self.blocking, self.catalogue = blocking, Catalogue(ITEMS)

    async def recommend(self, query, deadline):
        if self.blocking:
            time.sleep(SLATE_S)
        else:
            await asyncio.sleep(SLATE_S)
        item = SlateItem(item_id="i", item_key=int(keys(["i"])[0]), score=1.0)
        return Slate(request_id=query.request_id, items=(item,), tier=Tier.POPULAR)


@pytest.fixture(params=[True, False], ids=["blocking", "waiting"])
async def served(request, tmp_path):
    """Address of a RecommendationService, and a way to stop it and see what was recorded."""
    with open_log(f"embedded:{tmp_path}") as log:
        log.create_topics({"impressions": 1})
        writer, server = LogWriter(log.producer(), 8 << 20), Server(2.0)
        service = RecommendService(
            lambda: InForce(cascade=Busy(request.param)),
            ManualClock(1),
            Admission(AdmissionConfig()),
            Impressions(writer, "impressions", "run"),
            ServingConfig(),
        )
        pb_grpc.add_RecommendationServiceServicer_to_server(service, server.grpc)
        port = await server.start("127.0.0.1:0", [])

        async def recorded():
            await server.drain()
            await asyncio.to_thread(writer.close, 5.0)
            values = [v for b in read_all(log, "impressions") for v in b.values]
            return [event_pb2.Impression.FromString(v).request_id for v in values]

        yield f"127.0.0.1:{port}", recorded


def ask(target):
    """Four callers, two of whom do not wait."""
    with grpc.insecure_channel(target) as channel:
        stub = pb_grpc.RecommendationServiceStub(channel)

        def call(request_id, timeout=10.0):
            return stub.Recommend.future(pb.RecommendRequest(user_id="u", request_id=request_id), timeout=timeout)

        assert call("patient").result().items[0].item_id == "i"
        assert call("in a hurry", timeout=SLATE_S / 3).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        hung_up = call("hung up")
        time.sleep(SLATE_S / 6)
        hung_up.cancel()
        time.sleep(2 * SLATE_S)
        assert call("patient again").result().items


async def test_only_who_still_waits_has_seen_the_slate(served):
    target, recorded = served
    gone = metrics.IMPRESSIONS.labels("gone")._value
    before = gone.get()
    await asyncio.to_thread(ask, target)  # a thread of its own: it goes on while the server's loop is held
    assert await recorded() == ["patient", "patient again"]
    assert gone.get() - before <= 2


def test_slates_of_one_request_id_are_different_events():
    """A storefront may send its trace id with all calls of a page."""
    item = SlateItem(item_id="i", item_key=int(keys(["i"])[0]), score=1.0)
    query = Query(user_id="u", as_of_us=1, request_id="page")
    slates = [impression(query, Slate(request_id="page", items=(item,), tier=Tier.POPULAR), "run") for _ in range(2)]
    found = decode_impressions([s.SerializeToString() for s in slates]).batch
    assert len(set(found.strings("event_id"))) == 2
    assert found.strings("request_id") == ["page", "page"]
