"""Reading one user and 200 items as a request does: from the embedded store, from Redis, from a three-node Cluster.

peer: the same bytes fetched raw and left as they are: LMDB look-ups, one MGET, one pipelined MGET per bucket. Reads
take turns one by one, so that both meet the same moods of the machine; CPU time of the reading thread stands beside
wall time, for machines that are not quiet. And the point-in-time join of training (`recsys.bench.point_in_time`).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import redis

from feature_store.materialize import materialize
from feature_store.online import open_reader, open_store
from feature_store.online.redis.layout import META, Keys, Meta
from recsys.bench import made_up, point_in_time
from recsys.bench.harness import Row, duel
from recsys.bench.servers import redis_cluster, redis_standalone
from recsys.core import Deadline
from recsys.core.urls import scheme

_ITEMS_READ = 200
Request = tuple[str, list[str]]
Raw = Callable[[Request], object]


def bench(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Milliseconds per request's reads; seconds and memory of the join."""
    num_events, num_users, num_items = (2_000, 100, 400) if quick else (200_000, 5_000, 20_000)
    num_reads, repeats = (10, 2) if quick else (300, 7)
    join_rows, join_repeats = (2_000, 1) if quick else (10_000_000, 1)
    events = made_up.events(num_events, num_users, num_items)
    asked = _requests(events.strings("item_id"), num_users, num_reads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="double11-bench.") as folder:
        root = Path(folder)
        stores: dict[str, AbstractContextManager[str]] = {
            "embedded": nullcontext(f"embedded:{root / 'embedded'}"),
            "Redis": redis_standalone(root / "redis"),
            "Redis Cluster, 3 nodes": redis_cluster(root / "cluster"),
        }
        for name, running in stores.items():
            with running as url:
                store = open_store(url)
                materialize([events], store)
                store.close()
                rows += asyncio.run(_reads(name, url, asked, repeats))
        (root / "join").mkdir()
        rows += point_in_time.bench(root / "join", join_rows, join_rows // 10, join_repeats)
    config = {
        "events": num_events, "users": num_users, "items": num_items, "reads": num_reads, "repeats": repeats,
        "join_rows": join_rows,
    }  # fmt: skip
    return config, rows


def _requests(item_ids: Sequence[str | None], num_users: int, num_reads: int) -> list[Request]:
    """Any user, and items as often as they are acted on: candidates are rarely the forgotten ones."""
    rng = np.random.default_rng(0)
    popular = np.array([i for i in item_ids if i])
    found = []
    for _ in range(num_reads):
        items = dict.fromkeys(popular[rng.permutation(len(popular))].tolist())
        found.append((f"u{rng.integers(num_users)}", list(items)[:_ITEMS_READ]))
    return found


async def _reads(name: str, url: str, asked: Sequence[Request], repeats: int) -> list[Row]:
    as_of_us, never = made_up.START_US + made_up.SPAN_US, Deadline.never()
    reader = open_reader(url)

    async def ours(request: Request) -> None:
        await asyncio.gather(reader.user(request[0], as_of_us, never), reader.items(request[1], as_of_us, never))

    what = f"read a user and {_ITEMS_READ} items, {name}"
    raw_name, raw = _raw(url, reader)
    rows = await duel(what, ("double11, all features", ours), (raw_name, _awaited(raw)), asked, repeats)
    reader.close()
    return rows


def _awaited(raw: Raw) -> Callable[[Request], Awaitable[None]]:
    async def read(request: Request) -> None:
        raw(request)

    return read


def _raw(url: str, reader: Any) -> tuple[str, Raw]:
    """What fetches the same bytes and does nothing with them."""
    if scheme(url) == "embedded":
        return "LMDB look-ups", lambda r: (reader.load("user", [r[0]]), reader.load("item", r[1]))
    ports = [int(place.rpartition(":")[2].partition("/")[0]) for place in url.removeprefix("redis://").split(",")]
    nodes: list[Any] = [redis.Redis(port=port) for port in ports]
    if len(nodes) == 1:
        client: Any = redis.Redis.from_url(url)
        keys = _keys(client)
        return "raw MGET", lambda r: client.execute_command(
            "MGET", *keys.of("user", [r[0]])[0], *keys.of("item", r[1])[0]
        )
    slots: dict[range, Any] = {}
    for first, last, (_, port, *_), *_ in nodes[0].execute_command("CLUSTER SLOTS"):
        slots[range(first, last + 1)] = next(n for n, p in zip(nodes, ports, strict=True) if p == port)
    owner: dict[int, Any] = {}

    def node_of(bucket: int, key: str) -> Any:
        if bucket not in owner:
            slot = nodes[0].execute_command("CLUSTER KEYSLOT", key)
            owner[bucket] = next(node for held, node in slots.items() if slot in held)
        return owner[bucket]

    keys = _keys(node_of(-1, META))

    def read(request: Request) -> None:
        names, buckets = keys.of("item", request[1])
        user, of_user = keys.of("user", [request[0]])
        by_bucket: dict[int, list[str]] = {}
        for bucket, key in zip([*of_user, *buckets], [*user, *names], strict=True):
            by_bucket.setdefault(bucket, []).append(key)
        pipes: dict[int, tuple[Any, list[list[str]]]] = {}
        for bucket, some in by_bucket.items():
            node = node_of(bucket, some[0])
            pipes.setdefault(id(node), (node, []))[1].append(some)
        for node, calls in pipes.values():
            pipe = node.pipeline(transaction=False)
            for some in calls:
                pipe.execute_command("MGET", *some)
            pipe.execute()

    return "raw MGET per bucket, pipelined", read


def _keys(client: Any) -> Keys:
    stored = client.hgetall(META)
    meta = Meta.of(stored, "benchmark")
    return Keys(meta.live, meta.buckets)
