"""A writer of a Redis store. Each side of each bucket moves with its offsets in one Lua call (ADR 8)."""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from redis import Redis
from redis.cluster import RedisCluster

from feature_store.base import ItemFeatures, UserFeatures
from feature_store.commit import Commit, EntityKind, EntryKind, OffsetStep, Position, other_log
from feature_store.config import RedisStoreConfig
from feature_store.online.redis.layout import BIND, META, SWITCH, Keys, Meta, field_of, side_of
from feature_store.online.redis.reader import Reads, load
from feature_store.online.redis.restarts import REFUSE_ANOTHER_RUN, RUN, Restarts
from feature_store.online.redis.server import Client, check_server, errors_of
from feature_store.read import item_features, user_features
from feature_store.views import VIEW_SET
from recsys.core import Conflict, Deadline, Unavailable

Source = tuple[str, int]
Part = tuple[EntityKind, int]  # side, bucket
_SIDES: tuple[EntityKind, EntityKind] = ("user", "item")
_DROP_KEYS_PER_CALL = 1_000

# KEYS: the offsets, then entities. ARGV: side; name of the write it follows from; name of this one; newest event time;
# number of offsets; field, expected, next of each; blobs. A call whose answer was lost is sent again: then the side has
# its name already.
_STEP = f"""
local off, side, n = KEYS[1], ARGV[1], tonumber(ARGV[5])
local name = redis.call('HGET', off, side) or ''
if name == ARGV[3] then return {{}} end
for i = 6, 5 + 3 * n, 3 do
  local stored = redis.call('HGET', off, ARGV[i]) or '0'
  if stored ~= ARGV[i + 1] then return {{ARGV[i], ARGV[i + 1], stored}} end
end
if name ~= ARGV[2] then return {{side, ARGV[2], name}} end
{REFUSE_ANOTHER_RUN}redis.call('HSET', off, side, ARGV[3])
for i = 6, 5 + 3 * n, 3 do redis.call('HSET', off, ARGV[i], ARGV[i + 2]) end
if tonumber(ARGV[4]) > tonumber(redis.call('HGET', off, 'newest') or '0') then
  redis.call('HSET', off, 'newest', ARGV[4])
end
local base = 4 + 3 * n
for k = 2, #KEYS do
  if ARGV[base + k] == '' then redis.call('DEL', KEYS[k]) else redis.call('SET', KEYS[k], ARGV[base + k]) end
end
return {{}}
"""


class RedisStore(Reads):
    """A BucketStore. Writers are not kept out but fenced: whoever comes second with a step gets a Conflict."""

    def __init__(self, url: str, config: RedisStoreConfig | None = None) -> None:
        """Raises: BadInput for the URL or the login; VersionMismatch for a server that evicts state; Unavailable."""
        super().__init__(url, config)
        with errors_of(self.what):
            check_server(self._client, self.what)
        self._open: _Namespace | None = None
        self._num_buckets = 0

    @property
    def num_buckets(self) -> int:
        """P, fixed when the store was created."""
        self._num_buckets = self._num_buckets or self.meta().buckets
        return self._num_buckets

    def namespace(self) -> str:
        """The store and what is live in it."""
        meta = self.meta()
        return f"{meta.store_id}/{meta.live}"

    async def user(self, user_id: str, as_of_us: int, deadline: Deadline) -> UserFeatures:
        """All features of one user; waits for the server. Raises: DeadlineExceeded, Unavailable, CorruptData."""
        deadline.require("features of a user")
        return user_features(user_id, self.load("user", [user_id])[0], as_of_us)

    async def items(self, item_ids: Sequence[str], as_of_us: int, deadline: Deadline) -> ItemFeatures:
        """Features of N items; waits for the server. Raises: DeadlineExceeded, Unavailable, CorruptData."""
        deadline.require("features of items")
        return item_features(self.load("item", item_ids), as_of_us)

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities, b"" for unknown ones. Raises: Unavailable, VersionMismatch."""
        return self._live.load(kind, ids, shadow=shadow)

    def offsets(self, topic: str) -> Mapping[int, int]:
        """Next offset to read, by partition, read anew. Raises: Unavailable, VersionMismatch."""
        return self._live.offsets(topic)

    def claim(self, side: EntityKind, buckets: Iterable[int]) -> Mapping[int, Position]:
        """What one side of some buckets has come to; commits follow from it. Raises: Unavailable, VersionMismatch."""
        meta = self.meta()
        if self._open is None or self._open.ns != meta.live:
            self._open = self._namespace(meta)
        return self._open.claim(side, buckets)

    def verify(self, side: EntityKind, buckets: Iterable[int]) -> None:
        """Return if nobody has written to these since, nothing was lost, and no rebuild was switched to.

        Raises: Conflict, Unavailable.
        """
        meta = self.meta()
        if meta.live != self._live.ns:
            raise Conflict(
                f"step for {self.what}",
                came=f"one for namespace {self._live.ns}",
                expected=f"{meta.live}, which is live",
                fix="A rebuilt store was switched to; start from its offsets.",
            )
        self._live.verify(side, buckets)

    def commit(self, step: Commit) -> None:
        """Take the step, each side of each bucket by itself.

        Raises: Conflict when one was not as claimed or committed last; others may have taken their part. Overloaded,
        Unavailable; then it is not known which have.
        """
        live = self._live
        self._open = None  # until the step is through, what is stored is not known
        try:
            live.write(step)
        except Unavailable:
            self._hang_up()
            raise
        self._open = live

    def bind(self, log_id: str) -> None:
        """Say which log the offsets are of. Raises: VersionMismatch, Unavailable."""
        self.meta()  # there is one
        with errors_of(self.what):
            stored: Any = self._client.eval(BIND, 1, META, log_id)
        if stored.decode() != log_id:
            raise other_log(self.what, log_id, stored.decode())

    def rebuild(self) -> RedisRebuild:
        """A new, empty namespace beside the live one; readers see it after `RedisRebuild.switch`."""
        return RedisRebuild(self._client, self.what, self._config, self._forget_offsets)

    def _hang_up(self) -> None:
        """A server that has become a replica refuses every write, and its name may lead to another one by now."""
        if isinstance(self._client, Redis):
            self._client.connection_pool.disconnect()

    def _forget_offsets(self) -> None:
        self._open = None

    def _namespace(self, meta: Meta) -> _Namespace:
        return _Namespace(self._client, self.what, meta.live, meta.buckets, self._config.timeout_s)

    @property
    def _live(self) -> _Namespace:
        if self._open is None:
            meta = self.meta()
            self._open = self._namespace(meta)
        return self._open


@dataclass(slots=True)
class _Call:
    """What one side of one bucket takes."""

    offsets: list[tuple[str, int, int]] = field(default_factory=list)  # field, expected, next
    names: list[str] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)


class _Namespace:
    """Buckets of one namespace, and the name of the last write to each side that this writer knows."""

    def __init__(self, client: Client, what: str, ns: str, num_buckets: int, wait_s: float) -> None:
        """wait_s: for a server that was started anew (`Restarts`)."""
        self._client, self._what, self.ns, self.num_buckets = client, what, ns, num_buckets
        self._keys = Keys(ns, num_buckets)
        keys = [self._keys.offsets(b) for b in range(num_buckets)]
        self.settle = Restarts(client, what, keys, wait_s).settle
        self._known: dict[Part, str] = {}

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities. A commit follows from what was there before the first load of its side."""
        groups = self._keys.grouped(kind, ids, shadow=shadow)
        self._claim_unknown(side_of(kind), {bucket for bucket, _, _ in groups})
        return load(self._client, groups, self._what)

    def offsets(self, topic: str) -> dict[int, int]:
        """Next offset by partition."""
        found = {}
        for bucket, stored in enumerate(self._stored(range(self.num_buckets))):
            for side in _SIDES:
                _, name = field_of(OffsetStep(topic, bucket, 0, 0, side))
                if name.encode() in stored:
                    found[bucket] = int(stored[name.encode()])
        return found

    def claim(self, side: EntityKind, buckets: Iterable[int]) -> dict[int, Position]:
        """Positions as they are now, on servers that can be written to."""
        self.settle()
        wanted, found = list(buckets), {}
        for bucket, stored in zip(wanted, self._stored(wanted), strict=True):
            self._known[side, bucket] = stored.get(side.encode(), b"").decode()
            offsets, marks = {}, {}
            for name, value in stored.items():
                letter, _, source = name.decode().partition(":")
                topic, _, partition = source.rpartition(":")
                if letter == side[0] and topic:
                    offsets[topic, int(partition)] = int(value)
                elif letter == "m" and side == "item":
                    marks[topic, int(partition)] = int(value)
            found[bucket] = Position(offsets=offsets, marks=marks)
        return found

    def _claim_unknown(self, side: EntityKind, buckets: Iterable[int]) -> None:
        if unknown := [b for b in buckets if (side, b) not in self._known]:
            self.claim(side, unknown)

    def verify(self, side: EntityKind, buckets: Iterable[int]) -> None:
        """Raises: Conflict for a side that is not as this writer knows it."""
        wanted = list(buckets)
        with errors_of(self._what):
            pipe: Any = self._client.pipeline(transaction=False)
            for bucket in wanted:
                pipe.execute_command("HGET", self._keys.offsets(bucket), side)
            answers = pipe.execute()
        for bucket, answer in zip(wanted, answers, strict=True):
            if (answer or b"").decode() != self._known.get((side, bucket), ""):
                raise self._overtaken((side, bucket))

    def write(self, step: Commit) -> None:
        """One call for each side of each bucket that the step concerns; a side never claimed is claimed first."""
        calls = self._calls(step)
        for side in _SIDES:
            self._claim_unknown(side, {b for s, b in calls if s == side})
        name = secrets.token_hex(8)
        with errors_of(self._what):
            pipe: Any = self._client.pipeline(transaction=False)
            for part, call in calls.items():
                pipe.execute_command("EVAL", _STEP, *self._arguments(part, call, name, step.max_event_time_us))
            answers = pipe.execute()
        for part, answer in zip(calls, answers, strict=True):
            if not answer:
                self._known[part] = name
        for part, answer in zip(calls, answers, strict=True):
            if answer:
                raise self._refused(part, *(a.decode() for a in answer))

    def _calls(self, step: Commit) -> dict[Part, _Call]:
        calls: defaultdict[Part, _Call] = defaultdict(_Call)
        for o in step.offsets:
            bucket, name = field_of(o)
            calls["item" if o.bucket is not None else o.side, bucket].offsets.append((name, o.expected, o.next))
        for update in step.all_updates:
            side = side_of(update.kind)
            for bucket, at, names in self._keys.grouped(update.kind, update.ids, shadow=update.shadow):
                call = calls[side, bucket]
                call.names += names
                call.blobs += [update.blobs[i] for i in at]
        if not calls and step.max_event_time_us:
            calls["user", 0] = _Call()
        return calls

    def _arguments(self, part: Part, call: _Call, name: str, newest_us: int) -> list[str | bytes | int]:
        side, bucket = part
        moves = [value for move in call.offsets for value in move]
        head = [side, self._known[part], name, newest_us, len(call.offsets), *moves]
        return [1 + len(call.names), self._keys.offsets(bucket), *call.names, *head, *call.blobs]

    def _stored(self, buckets: Iterable[int]) -> list[dict[bytes, bytes]]:
        """The offsets of some buckets as they are now."""
        with errors_of(self._what):
            pipe: Any = self._client.pipeline(transaction=False)
            for bucket in buckets:
                pipe.execute_command("HGETALL", self._keys.offsets(bucket))
            found: list[dict[bytes, bytes]] = pipe.execute()
        return found

    def _refused(self, part: Part, name: str, expected: str, stored: str) -> Conflict:
        if name == RUN:
            return Conflict(
                f"bucket {part[1]} of {self._what}",
                came="a step for the server as it was before it was started anew, or before the bucket moved",
                expected="one for the server as it is now",
                fix="Start again from the stored offset; it has its AOF written anew first.",
            )
        source, _, partition = name.partition(":")[2].rpartition(":")
        if not source:
            return self._overtaken(part)
        return Conflict(
            f"offset of {source}, partition {partition}, in bucket {part[1]} of {self._what}",
            came=f"a step from {expected}",
            expected=f"from {stored}, which is stored",
            fix=_FIX,
        )

    def _overtaken(self, part: Part) -> Conflict:
        return Conflict(
            f"{part[0]} side of bucket {part[1]} of {self._what}",
            came="a step made from what it held before",
            expected="from what it holds now",
            fix=_FIX,
        )


_FIX = "Another writer was first, or the server lost its last second; start again from the stored offset."


class RedisRebuild:
    """Fills a namespace that nobody reads yet, then makes it the live one in one write."""

    def __init__(self, client: Client, what: str, config: RedisStoreConfig, on_switch: Callable[[], None]) -> None:
        """Namespaces that are not live, left by a rebuild that died, are dropped."""
        self._client, self._what, self._config, self._on_switch = client, what, config, on_switch
        with errors_of(what):
            stored: Any = client.hgetall(META)
            old = Meta.parse(stored, what)
            _Namespace(client, what, old.live, old.buckets, config.timeout_s).settle()
            self._number: Any = client.hincrby(META, "rebuilds", 1)
            _drop(client, keep=old.live)
        self._new = _Namespace(client, what, f"{VIEW_SET}.{self._number}", old.buckets, config.timeout_s)

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities in the new namespace."""
        return self._new.load(kind, ids)

    def commit(self, step: Commit) -> None:
        """Write into the new namespace; offsets of side "user" become the marks of all items (see `Rebuild`).

        Raises: Conflict for an offset that is not as expected; Overloaded, Unavailable.
        """
        buckets = range(self._new.num_buckets)
        marks = [replace(o, side="item", bucket=b) for o in step.offsets if o.side == "user" for b in buckets]
        self._new.write(replace(step, offsets=[*step.offsets, *marks]))

    def switch(self, log_id: str = "") -> None:
        """Make the new namespace live; the old one is dropped once no reader can be in it.

        Raises: Conflict when another rebuild began after this one: it has dropped what this one had written.
        """
        with errors_of(self._what):
            done: Any = self._client.eval(SWITCH, 1, META, self._new.ns, self._number, log_id)
            if not done:
                raise Conflict(
                    f"rebuild of {self._what}",
                    came="a later rebuild",
                    expected="one at a time",
                    fix="Let the later one finish.",
                )
            self._on_switch()
            time.sleep(2 * self._config.meta_refresh_s)
            _drop(self._client, keep=self._new.ns)

    def close(self) -> None:
        """Nothing is held; what was not switched to is dropped by the next rebuild."""


def _drop(client: Client, keep: str) -> None:
    """Delete every namespace but one."""
    options = {"target_nodes": RedisCluster.PRIMARIES} if isinstance(client, RedisCluster) else {}
    batch: list[bytes] = []
    for name in client.scan_iter("{d11:*", count=_DROP_KEYS_PER_CALL, **options):
        if not name.removeprefix(b"{d11:").removeprefix(b"shadow-").startswith(f"{keep}:".encode()):
            batch.append(name)
        if len(batch) == _DROP_KEYS_PER_CALL:
            _unlink(client, batch)
            batch = []
    _unlink(client, batch)


def _unlink(client: Client, names: Sequence[bytes]) -> None:
    pipe: Any = client.pipeline(transaction=False)
    for name in names:
        pipe.execute_command("UNLINK", name)
    pipe.execute()
