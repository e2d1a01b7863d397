"""Reading features from Redis: one MGET on a standalone server, one pipelined MGET per bucket on a cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

from redis.crc import key_slot
from redis.exceptions import RedisClusterException, RedisError

from feature_store.base import ItemFeatures, UserFeatures
from feature_store.commit import EntryKind
from feature_store.config import RedisStoreConfig
from feature_store.online.redis.fetch import Answers, Fetcher
from feature_store.online.redis.layout import CREATE, META, NEWEST, Group, Keys, Meta, new_meta
from feature_store.online.redis.server import Address, Client, errors_of
from feature_store.read import item_features, user_features
from feature_store.views import VIEW_SET
from recsys.core import Deadline, DeadlineExceeded, Unavailable, metrics

_KEYS_PER_CALL_MAX = 2_000  # a call keeps the server from everybody else


class Reads:
    """What readers and the writer have in common: the meta record and synchronous reads."""

    def __init__(self, url: str, config: RedisStoreConfig | None = None) -> None:
        """Creates the store's meta record where there is none.

        Raises: BadInput for the URL or the login; Unavailable.
        """
        self._config = config or RedisStoreConfig()
        self.address = Address.parse(url)
        self.what = str(self.address)
        with errors_of(self.what):
            self._client: Client = self.address.client(self._config)
            self._client.eval(CREATE, 1, META, *new_meta(self._config.buckets))

    @property
    def view_set(self) -> str:
        """Version of the view set that is read."""
        return VIEW_SET

    @property
    def store_id(self) -> str:
        """Written at creation."""
        return self.meta().store_id

    def meta(self) -> Meta:
        """The meta record as it is now. Raises: CorruptData, VersionMismatch, Unavailable."""
        with errors_of(self.what):
            stored: Any = self._client.hgetall(META)
        return Meta.of(stored, self.what)

    def max_event_time_us(self) -> int:
        """The largest event time applied; 0 for an empty store. Waits for the server."""
        meta = self.meta()
        keys = Keys(meta.live, meta.buckets)
        with errors_of(self.what):
            pipe: Any = self._client.pipeline(transaction=False)
            for bucket in range(meta.buckets):
                pipe.execute_command("HGET", keys.offsets(bucket), NEWEST)
            return max(int(stored or 0) for stored in pipe.execute())

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities, b"" for unknown ones. Raises: Unavailable, VersionMismatch."""
        meta = self.meta()
        groups = Keys(meta.live, meta.buckets).grouped(kind, ids, shadow=shadow)
        return load(self._client, groups, self.what)

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()


class RedisReader(Reads):
    """A FeatureReader in any process. Connections are bounded; a read waits for one within its deadline."""

    def __init__(self, url: str, config: RedisStoreConfig | None = None) -> None:
        """Raises: BadInput for the URL or the login; CorruptData, VersionMismatch, Unavailable."""
        super().__init__(url, config)
        self._async: Fetcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._learn(self.meta())

    async def user(self, user_id: str, as_of_us: int, deadline: Deadline) -> UserFeatures:
        """All features of one user. Raises: DeadlineExceeded, Unavailable, CorruptData, VersionMismatch."""
        deadline.require("features of a user")
        return user_features(user_id, (await self._read("user", [user_id], deadline))[0], as_of_us)

    async def items(self, item_ids: Sequence[str], as_of_us: int, deadline: Deadline) -> ItemFeatures:
        """Features of N items. Raises: DeadlineExceeded, Unavailable, CorruptData, VersionMismatch."""
        deadline.require("features of items")
        return item_features(await self._read("item", item_ids, deadline), as_of_us)

    async def aclose(self) -> None:
        """Let go of all connections."""
        fetcher, self._async = self._async, None
        if fetcher is not None:
            await fetcher.client.aclose()
        super().close()

    def close(self) -> None:
        """Let go of all connections; those of the event loop as soon as it runs again."""
        fetcher, self._async = self._async, None
        if fetcher is not None and self._loop is not None and not self._loop.is_closed():
            if self._loop.is_running():
                self._closing = self._loop.create_task(fetcher.client.aclose())
            else:
                self._loop.run_until_complete(fetcher.client.aclose())
        super().close()

    async def _read(self, kind: EntryKind, ids: Sequence[str], deadline: Deadline) -> list[bytes]:
        try:
            left_s = deadline.timeout_s()
            longest_s = self._config.timeout_s if left_s is None else min(left_s, self._config.timeout_s)
            async with asyncio.timeout(longest_s) as limit:
                with errors_of(self.what):
                    fetcher = self._connected()
                    if self._is_due():
                        async with fetcher.learning:
                            if self._is_due():  # whoever waited knows what the first one learnt
                                stored: Any = await fetcher.client.hgetall(META)
                                self._learn(Meta.of(stored, self.what))
                    return await self._load(fetcher, kind, ids)
        except TimeoutError as error:
            if not limit.expired():
                raise
            if not deadline.expired:
                raise Unavailable(
                    self.what,
                    came=f"no answer within {self._config.timeout_s} s",
                    expected="an answer",
                    fix="Look at the server, or raise [feature_store.redis] timeout_s.",
                ) from error
            raise DeadlineExceeded(
                f"features from {self.what}",
                came="no answer before the deadline",
                expected="one in time",
                fix="Look at the server's latency, or allow a longer deadline.",
            ) from error

    async def _load(self, fetcher: Fetcher, kind: EntryKind, ids: Sequence[str]) -> list[bytes]:
        if not ids:
            return []
        names, buckets = self._keys.of(kind, ids)
        if not self.address.is_cluster:
            (found,) = await self._fetch(fetcher, [names], [])
            return [b or b"" for b in found]
        by_bucket = _by_bucket(buckets)
        calls = [[names[i] for i in at] for at in by_bucket.values()]
        found_by_bucket = await self._fetch(fetcher, calls, [self._slots[b] for b in by_bucket])
        return _scattered(len(ids), by_bucket.values(), found_by_bucket)

    async def _fetch(self, fetcher: Fetcher, calls: list[list[str]], slots: list[int]) -> Answers:
        try:
            return await fetcher.fetch(calls, slots)
        except (RedisError, RedisClusterException, OSError) as error:
            metrics.REDIS_READS_AGAIN.labels(type(error).__name__).inc()
            client = fetcher.client
            pipe: Any = client.pipeline(transaction=False) if not self.address.is_cluster else client.pipeline()
            for names in calls:
                pipe.execute_command("MGET", *names)
            answers: Answers = await pipe.execute()
            return answers

    def _is_due(self) -> bool:
        return time.monotonic() >= self._learn_at_s

    def _learn(self, meta: Meta) -> None:
        self._keys = Keys(meta.live, meta.buckets)
        self._slots = [key_slot(self._keys.offsets(b).encode()) for b in range(meta.buckets)]
        self._learn_at_s = time.monotonic() + self._config.meta_refresh_s

    def _connected(self) -> Fetcher:
        loop = asyncio.get_running_loop()
        if self._async is None or self._loop is not loop:
            client = self.address.async_client(self._config)
            self._async, self._loop = Fetcher(client, self._config.connections_max), loop
        return self._async


def load(client: Client, groups: Sequence[Group], what: str) -> list[bytes]:
    """Packed state of entities, b"" for unknown ones, in calls of bounded size. Raises: Unavailable."""
    parts = [
        (at[start : start + _KEYS_PER_CALL_MAX], names[start : start + _KEYS_PER_CALL_MAX])
        for _, at, names in groups
        for start in range(0, len(at), _KEYS_PER_CALL_MAX)
    ]
    if not parts:
        return []
    with errors_of(what):
        pipe: Any = client.pipeline(transaction=False)
        for _, names in parts:
            pipe.execute_command("MGET", *names)
        return _scattered(sum(len(at) for at, _ in parts), [at for at, _ in parts], pipe.execute())


def _by_bucket(buckets: Sequence[int]) -> dict[int, list[int]]:
    at: dict[int, list[int]] = {}
    for i, bucket in enumerate(buckets):
        at.setdefault(bucket, []).append(i)
    return at


def _scattered(n: int, parts: Iterable[Sequence[int]], answers: Sequence[Sequence[bytes | None]]) -> list[bytes]:
    """Answers of several calls, each at its place."""
    out = [b""] * n
    for at, found in zip(parts, answers, strict=True):
        for i, blob in zip(at, found, strict=True):
            out[i] = blob or b""
    return out
