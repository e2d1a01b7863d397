"""The path that the commands make, from a simulated shop to the report of its held-out sale day."""

import json

import grpc
import numpy as np
import polars as pl
import pytest
from double11.v1 import event_pb2, recommend_pb2, recommend_pb2_grpc
from serving_world import CUT, Gateway, done

from recsys.cli.common import parse_time_us
from streaming.log import open_log

ARMS = ("popular", "own_history", "retrieval", "rank", "full")


@pytest.fixture(scope="module")
def report(dataset, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("replay") / "report"
    args = ["--arms", ",".join(ARMS), "--from", CUT, "--queries-max", "40"]
    done("replay", dataset.root, "--run", run.root, "--out", out, *args)
    return out


def test_every_arm_is_reported_and_recomputes_from_its_slates(report):
    figures = json.loads((report / "report.json").read_text())
    slates = pl.read_parquet(report / "slates.parquet")
    queries = pl.read_parquet(report / "queries.parquet")
    assert set(figures["arms"]) == set(ARMS)
    assert figures["queries"] == len(queries) == 40
    discount = 1 / np.log2(np.arange(2, 12))
    for arm in ARMS:
        of_arm = slates.filter(pl.col("arm") == arm).sort("query_id", "rank")
        by_query = {q: rows["item_id"].to_list() for (q,), rows in of_arm.group_by("query_id", maintain_order=True)}
        ndcg = []
        for query_id, relevant in zip(queries["query_id"], queries["relevant"].to_list(), strict=True):
            hits = np.array([i in set(relevant) for i in by_query.get(query_id, [])[:10]], float)
            ndcg.append(hits @ discount[: len(hits)] / discount[: min(10, len(relevant))].sum())
        assert figures["arms"][arm]["ndcg@10"] == pytest.approx(np.mean(ndcg), abs=1e-6)
        assert figures["arms"][arm]["fallbacks"] == 0


def test_replay_and_gateway_give_the_same_slates(report, run, dataset, tmp_path):
    """What replay judged is what the gateway serves: same run, same store content, same time."""
    url = f"embedded:{tmp_path}"
    done("streaming", "init", "--log", url)
    done("produce", dataset.root, "--sink", url, "--until", CUT)
    stock = event_pb2.StockChange(item_id="not in this shop", stock_units=1)
    last = event_pb2.Event(event_id="strikes-twelve", event_time_us=parse_time_us(CUT, "") - 1, stock=stock)
    with open_log(url) as log:
        producer = log.producer()
        producer.send("catalog", b"not in this shop", last.SerializeToString())
        producer.close()
    done("ingest", "--source", url, "--store", url, "--until-caught-up")
    slates = pl.read_parquet(report / "slates.parquet").filter(pl.col("arm") == "full")
    asked = slates.sort("user_id", "rank").group_by("user_id", maintain_order=True).agg("item_id").head(10)
    with (
        Gateway(tmp_path, run.root, "--no-writer") as gateway,  # no writer: impressions are features too
        grpc.insecure_channel(gateway.target) as channel,
    ):
        stub = recommend_pb2_grpc.RecommendationServiceStub(channel)
        for user_id, item_ids in asked.iter_rows():
            answer = stub.Recommend(recommend_pb2.RecommendRequest(user_id=user_id, limit=100), timeout=10)
            assert answer.tier == recommend_pb2.TIER_FULL
            assert [i.item_id for i in answer.items] == item_ids
