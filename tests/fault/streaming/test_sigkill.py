"""SIGKILL of the ingesting process at random points: the state equals a single pass that shares no code with ours."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import polars as pl
import pytest

from feature_store.online import open_reader
from recsys.core import Deadline, EventBatch, EventType, key
from streaming.config import StreamingConfig, Topics
from streaming.dead_letter import letters
from streaming.log import open_log
from streaming.produce import produce

NEVER = Deadline.never()
T = 1_600_000_000_000_000
KILLS = 6
EVENTS = 6_000
WORKER = """
import sys
from pathlib import Path
from feature_store.online import open_store
from streaming.archive import Archive
from streaming.config import JobConfig
from streaming.job import Job
from streaming.log import open_log

url, archive = sys.argv[1], Archive(Path(sys.argv[2]), sys.argv[1])
with open_log(url) as log:
    store = open_store(url)
    job = Job(log, store, JobConfig(batch_records_max=150), archive=archive, on_step=lambda n: print(n, flush=True))
    job.run(until_caught_up=True)
    job.close()
    archive.finish()
    store.close()
"""


def traffic(seed: int) -> list[dict]:
    """Events in arrival order: disorder within hours, every tenth one sent twice."""
    rng = random.Random(seed)
    sent = []
    for i in range(EVENTS):
        event = {
            "event_id": f"e{i}",
            "kind": 1,
            "event_type": rng.randint(1, 6),
            "event_time": T + i * 60_000_000 + rng.randint(0, 3_600) * 1_000_000,
            "user_id": f"u{min(int(rng.paretovariate(0.7)), 60)}",
            "item_id": f"i{rng.randint(0, 40)}",
            "price": rng.choice([None, 100, 250]),
        }
        sent.append(event)
        if rng.random() < 0.1:
            sent.append(rng.choice(sent[-50:]))
    return sent


def oracle(sent: list[dict]) -> dict[str, dict]:
    """Each id once, in one pass over plain dictionaries."""
    found = defaultdict(lambda: {"count": Counter(), "actions": [], "pairs": defaultdict(Counter)})
    for e in {e["event_id"]: e for e in sent}.values():
        user = found[e["user_id"]]
        user["count"][e["event_type"]] += 1
        if e["event_type"] != 1:
            user["actions"].append((e["event_time"], e["event_type"], e["item_id"]))
            user["pairs"][e["item_id"]][e["event_type"]] += 1
    return found


async def check(url: str, sent: list[dict]) -> None:
    reader, now = open_reader(url), max(e["event_time"] for e in sent) + 1
    expected = oracle(sent)
    for user_id, want in expected.items():
        user = await reader.user(user_id, now, NEVER)
        got = {t: user.values[f"{EventType(t).label}_count_all"] for t in range(1, 7)}
        assert got == {t: want["count"][t] for t in range(1, 7)}, user_id
        if len(want["actions"]) <= 30:  # below every declared bound: all of them are there
            times = zip(user.recent_time_us.tolist(), user.recent_item_key.tolist(), strict=True)
            assert sorted(times) == sorted((t, key(i)) for t, _, i in want["actions"])
            pairs = dict(zip(user.pair_item_key.tolist(), user.pair_count.tolist(), strict=True))
            assert pairs == {key(i): [c[t] for t in range(7)] for i, c in want["pairs"].items()}
    items = [f"i{i}" for i in range(41)]
    found = await reader.items(items, now, NEVER)
    sold = Counter(e["item_id"] for e in {e["event_id"]: e for e in sent}.values() if e["event_type"] == 5)
    assert found.column("purchase_count_all").tolist() == [sold[i] for i in items]
    reader.close()


def prepare(path, seed: int) -> tuple[str, list[dict]]:
    url, sent = f"embedded:{path}", traffic(seed)
    with open_log(url) as log:
        log.create_topics(StreamingConfig(partitions=4).partitions_by_topic(Topics()))
        columns = {name: [e[name] for e in sent] for name in sent[0]}
        produce(EventBatch.from_columns(columns).chunks(1_000), log)
        producer = log.producer()
        for i in range(20):
            producer.send("events", b"poison-%d" % i, b"\xff\xff")
        producer.close()
    return url, sent


@pytest.mark.parametrize("seed", [11])
async def test_killed_anywhere_nothing_is_lost_or_doubled(tmp_path, seed):
    url, sent = prepare(tmp_path, seed)
    rng, kills = random.Random(seed), 0
    argv = [sys.executable, "-c", WORKER, url, str(tmp_path / "archive")]
    while True:
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            steps = rng.randint(1, 5) if kills < KILLS else EVENTS
            ended = not all(worker.stdout.readline() for _ in range(steps))
            if ended:
                assert worker.wait() == 0
                break
            time.sleep(rng.random() * 0.05)  # anywhere inside the next steps
            worker.kill()
            kills += 1
    assert kills == KILLS
    await check(url, sent)
    archived = pl.read_parquet(tmp_path / "archive/events/day=*/*.parquet", hive_partitioning=False)
    assert sorted(archived["event_id"]) == sorted({e["event_id"] for e in sent})
    with open_log(url) as log:
        assert Counter(m.cause for m in letters(log, "dead-letter")) == {"undecodable": 20}


async def test_sigterm_drains_and_the_next_run_goes_on(tmp_path):
    url, sent = prepare(tmp_path, 5)
    command = [
        sys.executable,
        "-c",
        "from recsys.cli.main import main; main()",
        "ingest",
        "--source",
        url,
        "--store",
        url,
    ]
    environ = os.environ | {
        "DOUBLE11__STREAMING__JOB__BATCH_RECORDS_MAX": "200",
        "DOUBLE11__STREAMING__PARTITIONS": "4",
    }
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True, env=environ) as worker:
        reader = open_reader(url)
        while reader.max_event_time_us() == 0:
            time.sleep(0.01)
        reader.close()
        worker.send_signal(signal.SIGTERM)
        out, _ = worker.communicate()
    assert worker.returncode == 0
    assert json.loads(out.splitlines()[-1])["events"]["applied"] > 0
    done = subprocess.run([*command, "--until-caught-up"], env=environ, check=False)
    assert done.returncode == 0
    await check(url, sent)
