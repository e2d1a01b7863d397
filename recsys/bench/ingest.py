"""Events through the log into the store: a simulated crowd, all views, durable at both ends, one worker.

Embedded log to embedded store, and Kafka to Redis (AOF everysec) with broker and server on the same machine. Beside
the rate: raw confluent-kafka consuming the same topic, raw Redis reading and writing as many bytes of distinct blobs
(MGET and a Lua script), quixstreams counting the same events of users and of items, entities and bytes written per
event, resident memory early and at the end, and the time from produced to readable at 5,000 events/s by `double11
ingest`, everything configured the same. Rates per CPU second of the worker stand beside the rates, for machines that
are not quiet.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import redis

from feature_store.commit import Commit, EntryKind
from feature_store.online import open_store
from recsys.bench import freshness, made_up, quix
from recsys.bench.harness import Contest, Cost, Row, alone, figure, measure, sampled
from recsys.bench.servers import kafka, redis_standalone
from recsys.core import EventBatch, Unavailable, logging
from recsys.core.config import Config
from recsys.data import Dataset, simulate
from streaming.codec import encode_events
from streaming.config import JobConfig
from streaming.job import Job
from streaming.log import open_log, topics_at
from streaming.produce import produce
from streaming.topics import StreamingConfig, Topics

_log = logging.get_logger(__name__)
_KAFKA_ENVIRON = {
    "DOUBLE11__STREAMING__KAFKA__REPLICATION_FACTOR": "1",
    "DOUBLE11__STREAMING__KAFKA__MIN_INSYNC_REPLICAS": "1",
}
_TOPICS = ("events", "impressions", "item_updates", "catalog", "samples", "deltas", "dead_letter")
_RAW_KEYS_PER_CALL = 1_000
_QUIX = "quixstreams, the counts of users and items only"
_PEER_SHARE, _PEER_EVENTS = 20, 300_000  # of a long log the peer counts one event of so many, but at least these
_SET = "for i = 1, #KEYS do redis.call('SET', KEYS[i], ARGV[i]) end return #KEYS"


def bench(quick: bool, num_events: int | None = None) -> tuple[dict[str, Any], list[Row]]:
    """Events per second and what they cost."""
    num_events = num_events or (2_000 if quick else 10_000_000)
    rows, left_out = _produced(quick), []
    with tempfile.TemporaryDirectory(prefix="double11-bench.") as folder:
        root = Path(folder)
        simulate("tiny" if quick else "crowd", 0, root / "crowd")
        rows += _embedded(root, num_events)
        try:
            with kafka(root / "kafka") as broker, redis_standalone(root / "redis") as store, _kafka_topics():
                rows += _kafka_to_redis(root, f"kafka://{broker}", store, num_events, quick)
        except Unavailable as error:
            left_out.append(str(error))
            _log.warning("bench_left_out", what="Kafka to Redis", why=str(error))
    return {"events": num_events, "preset": "tiny" if quick else "crowd", "left_out": left_out}, rows


def _produced(quick: bool) -> list[Row]:
    """Into the embedded log, beside the same bytes in one fsynced file."""
    num_events, repeats = (1_000, 2) if quick else (50_000, 5)
    batch = made_up.events(num_events, num_users=num_events // 20, num_items=num_events // 10)
    payload = b"".join(value for _, _, value in encode_events(batch))
    with tempfile.TemporaryDirectory(prefix="double11-bench.") as folder:

        def send() -> float:
            return _fill(f"embedded:{folder}/{uuid4().hex}", [batch])

        def append() -> float:
            with Path(folder, uuid4().hex).open("wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            return num_events

        contest = Contest(
            what="produce to the log, fsynced",
            unit="per_s",
            ours=("double11 embedded log", send),
            limit=("the bytes in one fsynced file", append),
        )
        return measure([contest], repeats=repeats)


def _embedded(root: Path, num_events: int) -> list[Row]:
    url = f"embedded:{root / 'embedded'}"
    sent = _fill(url, _events(root, num_events))
    cost = alone(ingest, url, url, sent)
    return _rates("embedded log to embedded store", cost, {})


def _kafka_to_redis(root: Path, log: str, store: str, num_events: int, quick: bool) -> list[Row]:
    sent = _fill(log, _events(root, num_events))
    topic = topics_at(log, Config(environ=os.environ)).events
    address = log.removeprefix("kafka://")
    raw = alone(consume, address, topic, sent)
    server = redis.Redis.from_url(store)
    before_s = _cpu_s(server)
    cost = alone(ingest, log, store, sent)
    server_s = _cpu_s(server) - before_s
    counted = cost.result
    entities_per_event, bytes_per_entity = counted["written"] / sent, counted["bytes"] / max(counted["written"], 1)
    raw_store = alone(read_write, store, max(counted["written"] // _PEER_SHARE, 100), round(bytes_per_entity))
    peer_events = min(sent, max(sent // _PEER_SHARE, _PEER_EVENTS))
    peer = alone(quix.count, address, topic, peer_events, str(root / "quix"))
    limits = {
        "raw confluent-kafka consume": sent / raw.result,
        "raw Redis, as many entities of as many bytes": raw_store.result / entities_per_event,
        _QUIX: peer_events / peer.result[0],
    }
    rows = _rates("Kafka to Redis", cost, limits, (_QUIX, [peer_events / peer.result[1]]))
    rows.append(figure("Kafka to Redis, CPU of the Redis server per event", "us", server_s / sent * 1e6))
    return rows + freshness.rows(log, store, seconds=2 if quick else 30)


def _rates(
    what: str, cost: Cost, beside: Mapping[str, float], cpu_beside: tuple[str, list[float]] | None = None
) -> list[Row]:
    """Rows of one ingest. beside: what to compare the rate with; cpu_beside: the rate per CPU second."""
    found = cost.result
    rate, applied = found["events"] / found["seconds"], found["events"]
    name = f"{what}, {applied:,} events"
    rows = [sampled(name, "per_s", {"ours": ("double11 ingest", [rate])})]
    rows += [
        sampled(f"{name}, beside {peer}", "per_s", {"ours": ("double11 ingest", [rate]), "peer": (peer, [value])})
        for peer, value in beside.items()
    ]
    per_cpu_s = {"ours": ("double11 ingest", [applied / found["cpu_s"]])}
    if cpu_beside is not None:
        per_cpu_s["peer"] = cpu_beside
    rows += [
        sampled(f"{name}, per CPU second of the worker", "per_s", per_cpu_s),
        figure(f"{what}, entities written per event", "1", found["written"] / applied),
        figure(f"{what}, bytes written per event", "bytes", found["bytes"] / applied),
        sampled(
            f"{what}, resident memory without mapped files",
            "MiB",
            {"ours": ("at the end", [found["resident_end"]]), "peer": ("after a fifth", [found["resident_early"]])},
        ),
        figure(f"{what}, resident pages of mapped files, at the end", "MiB", found["mapped_end"]),
    ]
    return rows


def ingest(source: str, store_url: str, num_events: int) -> dict[str, float]:
    """One worker until it has caught up; resident memory after a fifth of the events and at the end."""
    config = Config(environ=os.environ)
    early = 0.0

    def on_step(_records: int) -> None:
        nonlocal early
        if not early and job.report.events["applied"] >= num_events / 5:
            early = _resident_mib()

    with open_log(source, config) as log:
        store: Any = _Counted(open_store(store_url, config))
        job = Job(log, store, config.get(JobConfig), topics=topics_at(source, config), on_step=on_step)
        cpu_s = time.process_time()
        report = job.run(until_caught_up=True)
        cpu_s = time.process_time() - cpu_s
        end, mapped = _resident_mib(), psutil.Process().memory_info().shared / (1 << 20)
        job.close()
        store.close()
    return {
        "events": report.events["applied"], "seconds": report.seconds, "cpu_s": cpu_s, "resident_early": early,
        "resident_end": end, "mapped_end": mapped, "written": store.entities.total(), "bytes": store.bytes,
    }  # fmt: skip


def _resident_mib() -> float:
    """Resident memory without mapped files: LMDB's are the system's cache, taken back when something needs it."""
    info = psutil.Process().memory_info()
    return float(info.rss - info.shared) / (1 << 20)


class _Counted:
    """A store that counts what is written to it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.entities: Counter[EntryKind] = Counter()
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, step: Commit) -> None:
        """Count, and pass on."""
        for update in step.all_updates:
            self.entities[update.kind] += len(update.ids)
            self.bytes += sum(map(len, update.blobs))
        self._store.commit(step)


def consume(address: str, topic: str, num_events: int) -> float:
    """Seconds in which confluent-kafka hands over as many records, nothing done with them."""
    from confluent_kafka import Consumer

    settings = {"bootstrap.servers": address, "group.id": uuid4().hex, "auto.offset.reset": "earliest"}
    consumer = Consumer(settings | {"enable.auto.commit": False})
    consumer.subscribe([topic])
    taken, started_s = 0, 0.0
    while taken < num_events:
        records = consumer.consume(10_000, timeout=10)
        started_s = started_s or time.perf_counter()  # joining the group is not consuming
        if not records:
            break
        taken += len(records)
    consumer.close()
    return (time.perf_counter() - started_s) * num_events / max(taken, 1)


def read_write(store: str, num_entities: int, num_bytes: int) -> float:
    """Entities a second that Redis reads (MGET) and writes (one Lua call) in calls of a thousand distinct ones."""
    client = redis.Redis.from_url(store)
    script = client.register_script(_SET)
    started_s = time.perf_counter()
    for first in range(0, num_entities, _RAW_KEYS_PER_CALL):
        keys = [f"{{raw}}:{i}" for i in range(first, min(first + _RAW_KEYS_PER_CALL, num_entities))]
        client.mget(keys)
        script(keys, [os.urandom(num_bytes) for _ in keys])
    seconds = time.perf_counter() - started_s
    client.unlink("{raw}:0")
    return num_entities / seconds


def _events(root: Path, num_events: int) -> Iterator[EventBatch]:
    """The first events of the simulated crowd, catalogue changes left out."""
    left = num_events
    for batch in Dataset.open(root / "crowd").event_batches(include_catalog=False):
        yield batch.slice(0, min(left, len(batch)))
        left -= len(batch)
        if left <= 0:
            return


def _fill(url: str, batches: Sequence[EventBatch] | Iterator[EventBatch]) -> int:
    """Make the topics and send; returns how many events."""
    config = Config(environ=os.environ)
    with open_log(url, config) as log:
        topics = topics_at(url, config)
        log.create_topics(config.get(StreamingConfig).partitions_by_topic(topics))
        return produce(batches, log, topics=topics).events


def _cpu_s(server: Any) -> float:
    used = server.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


@contextmanager
def _kafka_topics() -> Iterator[None]:
    """Topics of this run alone, in this process and those that it starts."""
    mark = f"bench-{uuid4().hex[:8]}"
    added = _KAFKA_ENVIRON | {
        f"DOUBLE11__STREAMING__TOPICS__{name.upper()}": f"{mark}-{name.replace('_', '-')}" for name in _TOPICS
    }
    assert set(Topics.__dataclass_fields__) == set(_TOPICS)
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
