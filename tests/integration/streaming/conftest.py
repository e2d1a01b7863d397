"""A log, a store and a job beside each other in one folder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from feature_store.online import open_store
from feature_store.online.embedded import EmbeddedStore
from recsys.core import EventBatch
from streaming.archive import Archive
from streaming.config import JobConfig, StreamingConfig, Topics
from streaming.job import Job, JobReport
from streaming.log import Log, open_log
from streaming.produce import produce

NEED_KAFKA = ["test_init.py", "test_kafka_secured.py", "test_samples_on_kafka.py", "test_workers.py"]
collect_ignore = [] if os.environ.get("DOUBLE11_KAFKA_HOME") else NEED_KAFKA


@dataclass
class Room:
    """`send` events, `ingest` them, read `store`."""

    path: Path
    log: Log
    store: EmbeddedStore
    config: JobConfig = field(default_factory=JobConfig)

    def send(self, *batches: EventBatch) -> None:
        produce(batches, self.log)

    def send_bytes(self, value: bytes, topic: str = "events", headers: dict[str, bytes] | None = None) -> None:
        producer = self.log.producer()
        producer.send(topic, b"u", value, headers)
        producer.close()

    def ingest(self, archive: Path | None = None) -> JobReport:
        kept = Archive(archive, "test") if archive else None
        job = Job(self.log, self.store, self.config, archive=kept)
        report = job.run(until_caught_up=True)
        job.close()
        if kept:
            kept.flush()
        return report


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    with open_log(f"embedded:{tmp_path}") as log:
        log.create_topics(StreamingConfig(partitions=4).partitions_by_topic(Topics()))
        store = open_store(f"embedded:{tmp_path}")
        yield Room(tmp_path, log, store)
        store.close()
