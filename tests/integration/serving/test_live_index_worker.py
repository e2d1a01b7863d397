"""A real worker process that follows the catalogue topic: what is listed is retrieved, what is delisted is not."""

import json
import signal
import subprocess
import sys
import time

import pytest
from double11.v1 import event_pb2, scoring_pb2, scoring_pb2_grpc

from recsys.bench import run as bench
from recsys.core import key
from recsys.core.items import ItemTable
from recsys.serving.remote import open_channel
from streaming.codec import record_key
from streaming.log import open_log

PARTITIONS = {"catalog": 2}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    with open_log(f"embedded:{tmp_path_factory.mktemp('log')}") as opened:
        opened.create_topics(PARTITIONS)
        yield opened


@pytest.fixture(scope="module")
def categories(run):
    return sorted({c for c in ItemTable.read(run.path("items.parquet")).column("category") if c})


def tell(log, event_id, item_id, listed, category="", at_us=1_000, title=""):
    change = event_pb2.ItemChange(item_id=item_id, listed=listed, category=category, title=title)
    event = event_pb2.Event(event_id=event_id, event_time_us=at_us, item=change)
    producer = log.producer()
    producer.send("catalog", record_key(event), event.SerializeToString())
    producer.flush()
    producer.close()


@pytest.fixture(scope="module")
def worker(run, log, categories, tmp_path_factory):
    tell(log, "before", "listed-before-the-start", True, categories[0])
    follow = ["--log", f"embedded:{log.path.parent}"]
    command = [sys.executable, "-m", "recsys.serving.worker", "--run", str(run.root), *follow]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told = map(json.loads, process.stdout)  # of its followers, too
        yield f"127.0.0.1:{next(line['port'] for line in told if 'port' in line)}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


async def retrieved(stub, seed_key):
    request = scoring_pb2.RetrieveRequest(
        history_keys=[seed_key], history_types=[5], history_times_us=[1], as_of_us=2, limit=10_000
    )
    return set((await stub.Retrieve(request, timeout=10)).item_keys)


async def becomes(stub, seed_key, item_id, there):
    """Seconds until the item is, or is no longer, among all that is retrieved."""
    started = time.monotonic()
    while (key(item_id) in await retrieved(stub, seed_key)) != there:
        assert time.monotonic() - started < 20, f"{item_id} never became {there}"
    return time.monotonic() - started


async def test_items_come_and_go_without_a_restart(run, log, worker, categories):
    known = ItemTable.read(run.path("items.parquet"))
    item_id, item_key = known.column("item_id")[0], int(known.item_key[0])
    async with open_channel(worker) as channel:
        stub = scoring_pb2_grpc.ScoringServiceStub(channel)
        assert key("listed-before-the-start") in await retrieved(stub, item_key)
        took = []
        for i in range(5):
            tell(log, f"list-{i}", "brand-new", True, categories[-1], at_us=2_000 + 2 * i)
            took.append(await becomes(stub, item_key, "brand-new", True))
            tell(log, f"delist-{i}", "brand-new", False, at_us=2_001 + 2 * i)
            took.append(await becomes(stub, item_key, "brand-new", False))
        assert sorted(took)[len(took) // 2] < 1  # the median: a busy machine may hold one of them up
        tell(log, "titled", "only-titled", True, title=known.column("title")[0])
        await becomes(stub, item_key, "only-titled", True)
        tell(log, "gone", item_id, False)
        await becomes(stub, item_key, item_id, False)


def test_the_benchmark_takes_the_tower_of_a_run(run):
    found = bench("retrieval", quick=True, run_path=run.root)
    assert found["config"]["source"] == str(run.root)
    (recall,) = [row["ours"] for row in found["rows"] if row["what"] == "recall@100, unseen queries"]
    assert recall > 0.9
