"""`ingest --archive --offline` on Kafka and Redis: two workers label samples, one is killed, none is lost."""

import time
from pathlib import Path

from double11.v1.sample_pb2 import Sample
from redis_world import redis_server
from samples_world import WINDOW, joined, traffic
from streaming_traffic import Sent
from streaming_world import Ingest, World

from feature_store.offline.samples import read_samples
from streaming.log import open_log, topics_at
from streaming.log.base import read_all

__all__ = ["redis_server"]
GIVEN_UP_S = 240
SETTINGS = {
    "STREAMING__PARTITIONS": 4,
    "FEATURE_STORE__REDIS__BUCKETS": 4,
    "STREAMING__JOB__BATCH_RECORDS_MAX": 50,
    "STREAMING__SAMPLES__WINDOW_S": WINDOW,
    "STREAMING__SAMPLES__GRACE_S": 0,
    "STREAMING__SAMPLES__SLICE_S": 5,
    "STREAMING__SAMPLES__LATE_S": 0.1,
    "STREAMING__SAMPLES__IDLE_S": 2,
    "STREAMING__SAMPLES__ROWS_MAX": 40,
}


def test_workers_label_samples_and_one_is_killed(kafka, kafka_config, redis_server, tmp_path):
    _, environ = kafka_config("confluent")
    environ |= {f"DOUBLE11__{name}": str(value) for name, value in SETTINGS.items()}
    world = World(f"kafka://{kafka}", redis_server.url, environ)
    world.init()
    made = traffic(9, 900)
    sent, expected = [Sent(t, u.encode(), m.SerializeToString()) for t, u, m in made], joined(made, 10_000)
    args = ("--archive", tmp_path / "archive", "--offline", tmp_path / "offline")
    with world.ingest(*args) as first, world.ingest(*args) as second:
        until(lambda: shares(first) and shares(second), "a share for each")
        world.send(sent[:450])
        assert second.until(30)
        second.kill()
        world.send(sent[450:])
        until(lambda: labelled(tmp_path / "offline") == expected, "every slot has its labels")
        first.stop()
    with open_log(world.log, world.config) as log:
        topic = topics_at(world.log, world.config).samples
        told = [Sample.FromString(v) for b in read_all(log, topic) for v in b.values]
    last = {m.sample_id: m for m in told}
    assert {(m.request_id, m.item_id): list(m.action_types) for m in last.values()} == expected


def shares(worker: Ingest) -> bool:
    return 0 < worker.num_partitions() < 8


def labelled(offline: Path) -> dict[tuple[str, str], list[int]]:
    if not any(offline.glob("samples/day=*/*.parquet")):
        return {}
    rows = read_samples(offline).collect()
    assert rows["sample_id"].n_unique() == len(rows)
    return {(r["request_id"], r["item_id"]): r["action_types"] for r in rows.iter_rows(named=True)}


def until(ready, what: str) -> None:
    until_s = time.monotonic() + GIVEN_UP_S
    while not ready():
        assert time.monotonic() < until_s, what
        time.sleep(0.1)
