"""Events through the embedded log into the embedded store, durable at both ends.

limit of producing: the same bytes appended to a file and fsynced once. limit of applying: the fold alone, in memory,
with neither log nor store. The peers (Kafka, Redis) come with their drivers.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

from feature_store.online import MemoryStore, open_store
from recsys.bench import made_up
from recsys.bench.harness import Contest, Row, measure
from streaming.codec import encode_events
from streaming.config import JobConfig
from streaming.job import Job
from streaming.log import open_log
from streaming.produce import produce
from streaming.topics import StreamingConfig, Topics


def bench(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Events per second, each way."""
    num_events, repeats = (1_000, 2) if quick else (50_000, 5)
    batch = made_up.events(num_events, num_users=num_events // 20, num_items=num_events // 10)
    payload = b"".join(value for _, _, value in encode_events(batch))
    with tempfile.TemporaryDirectory(prefix="double11-bench.") as folder:
        fresh = (Path(folder) / str(i) for i in itertools.count())

        def new_log(path: Path) -> Any:
            log = open_log(f"embedded:{path}")
            log.create_topics(StreamingConfig().partitions_by_topic(Topics()))
            return log

        def send() -> float:
            with new_log(next(fresh)) as log:
                return produce([batch], log).events

        def append() -> float:
            with next(fresh).open("wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            return num_events

        source = next(fresh)
        with new_log(source) as log:
            produce([batch], log)

            def apply() -> float:
                store = open_store(f"embedded:{next(fresh)}")
                job = Job(log, store, JobConfig())
                report = job.run(until_caught_up=True)
                job.close()
                store.close()
                return report.events["applied"]

            def fold() -> float:
                store = MemoryStore()
                store.apply(batch)
                store.load("user", ["u0"])  # folding waits for the first read
                return num_events

            rows = measure(
                [
                    Contest(
                        what="produce to the log, fsynced",
                        unit="per_s",
                        ours=("double11 embedded log", send),
                        limit=("the bytes in one fsynced file", append),
                    ),
                    Contest(
                        what="apply from the log to the store, exactly once",
                        unit="per_s",
                        ours=("double11 job", apply),
                        limit=("the fold alone, in memory", fold),
                    ),
                ],
                repeats=repeats,
            )
    return {"events": num_events, "event_bytes": round(len(payload) / num_events), "repeats": repeats}, rows
