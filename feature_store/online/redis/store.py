"""The one writer of a Redis store. Each side of each bucket moves with its offsets in one Lua call (ADR 7).

Items are written first, then what is kept by user. So whatever ends a step in between, no user is ahead of an item, and
a writer that starts again knows from the offsets of a bucket alone which events to leave out of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from redis.cluster import RedisCluster

from feature_store.base import ItemFeatures, UserFeatures
from feature_store.commit import Commit, EntityKind, EntryKind, OffsetStep, Unfinished, other_log
from feature_store.config import RedisStoreConfig
from feature_store.online.redis.layout import BIND, META, SWITCH, Keys, Meta, side_of
from feature_store.online.redis.reader import Reads, load
from feature_store.online.redis.server import Client, check_server, errors_of
from feature_store.read import item_features, user_features
from feature_store.state import Words
from feature_store.views import VIEW_SET
from recsys.core import Conflict, Deadline, VersionMismatch
from recsys.core.murmur2 import partitions_of

Source = tuple[str, int]
Part = tuple[bool, EntityKind, int]  # shadow, side, bucket
_SIDES: tuple[EntityKind, EntityKind] = ("item", "user")
_DROP_KEYS_PER_CALL = 1_000

# KEYS: the offsets, then entities. ARGV: number of sources; field, expected, next of each; newest event time; side and
# how often it has been written; blobs. The count also refuses a writer whose step is of other sources than the steps
# that came between. A call whose answer was lost is sent again: then every source is at `next` already.
_STEP = """
local n, off, done, stale = tonumber(ARGV[1]), KEYS[1], tonumber(ARGV[1]) > 0, false
local newest, side, writes, base = ARGV[3 * n + 2], ARGV[3 * n + 3], ARGV[3 * n + 4], 3 * n + 3
for i = 2, 3 * n, 3 do
  local stored = redis.call('HGET', off, ARGV[i]) or '0'
  if stored ~= ARGV[i + 2] then done = false end
  if stored ~= ARGV[i + 1] and not stale then stale = {ARGV[i], stored} end
end
if done then return {} end
if stale then return stale end
local written = redis.call('HGET', off, side) or '0'
if written ~= writes then return {side, written} end
redis.call('HINCRBY', off, side, 1)
for i = 2, 3 * n, 3 do redis.call('HSET', off, ARGV[i], ARGV[i + 2]) end
local stored = tonumber(redis.call('HGET', off, 'newest') or '0')
if tonumber(newest) > stored then redis.call('HSET', off, 'newest', newest) end
for k = 2, #KEYS do
  if ARGV[base + k] == '' then redis.call('DEL', KEYS[k]) else redis.call('SET', KEYS[k], ARGV[base + k]) end
end
return {}
"""


class RedisStore(Reads):
    """The writer. A second one is not kept out but fenced: whoever comes second with a step gets a Conflict."""

    def __init__(self, url: str, config: RedisStoreConfig | None = None) -> None:
        """Raises: BadInput for the URL or the login; VersionMismatch for a server that evicts state; Unavailable."""
        super().__init__(url, config)
        with errors_of(self.what):
            check_server(self._client, self.what)
        self._open: _Namespace | None = None

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
        """Next offset to read, by partition: the smallest of all buckets. Raises: Unavailable, VersionMismatch."""
        live = self._live
        found = {p: live.position((t, p)) for t, p in live.sources() if t == topic}
        return {p: offset for p, offset in found.items() if offset}

    def unfinished(self) -> Unfinished | None:
        """Where buckets are ahead of `offsets`.

        Raises: VersionMismatch when users are ahead of items: a cluster's node lost what the others kept.
        """
        return self._live.unfinished()

    def commit(self, step: Commit) -> None:
        """Take the step, bucket by bucket; see `unfinished` for what may end in between.

        Raises: Conflict when a stored offset is not the expected one; Overloaded, Unavailable.
        """
        live = self._live
        for o in step.offsets:
            if (at := live.position((o.topic, o.partition))) != o.expected:
                raise _conflict(self.what, o.topic, o.partition, o.expected, at)
        self._open = None  # until the step is through, what is stored is not known
        live.write(step)
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

    def _forget_offsets(self) -> None:
        self._open = None

    @property
    def _live(self) -> _Namespace:
        if self._open is None:
            meta = self.meta()
            self._open = _Namespace(self._client, self.what, meta.live, meta.buckets)
        return self._open


class _Namespace:
    """Buckets of one namespace and its shadow, and what this writer has read of their offsets."""

    def __init__(self, client: Client, what: str, ns: str, num_buckets: int) -> None:
        self._client, self._what, self.ns, self.num_buckets = client, what, ns, num_buckets
        self._keys = {shadow: Keys(ns, num_buckets, shadow=shadow) for shadow in (False, True)}
        self._at, self._writes = self._stored()

    def _stored(self) -> tuple[dict[Part, dict[Source, int]], Counter[Part]]:
        """Offsets and numbers of writes as they are now."""
        at: dict[Part, dict[Source, int]] = {}
        writes: Counter[Part] = Counter()
        wanted = [(shadow, bucket) for shadow in (False, True) for bucket in range(self.num_buckets)]
        with errors_of(self._what):
            pipe: Any = self._client.pipeline(transaction=False)
            for shadow, bucket in wanted:
                pipe.execute_command("HGETALL", self._keys[shadow].offsets(bucket))
            answers = pipe.execute()
        for (shadow, bucket), stored in zip(wanted, answers, strict=True):
            for name, value in stored.items():
                if b":" in name:
                    side, topic, partition = _parsed(name)
                    at.setdefault((shadow, side, bucket), {})[(topic, partition)] = int(value)
            for side in _SIDES:
                writes[shadow, side, bucket] = int(stored.get(side.encode(), 0))
        return at, writes

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities."""
        return load(self._client, self._keys[shadow], kind, ids, self._what)

    def sources(self) -> set[Source]:
        """Every (topic, partition) that a bucket has."""
        return {source for at in self._at.values() for source in at}

    def position(self, source: Source) -> int:
        """The smallest offset of all buckets; those of the shadow take part in a step only when it concerns them."""
        return int(min(self._done(source, shadow=False, side=side).min() for side in _SIDES))

    def unfinished(self) -> Unfinished | None:
        """See `RedisStore.unfinished`."""
        done = {
            source: {(shadow, side): self._done(source, shadow, side) for shadow in (False, True) for side in _SIDES}
            for source in self.sources()
        }
        for (topic, partition), by_side in done.items():
            item, user = by_side[False, "item"], by_side[False, "user"]
            if item.min() < user.max():
                raise VersionMismatch(
                    f"{self._what}, {topic}, partition {partition}",
                    came=f"items as of offset {item.min()}, users as of {user.max()}: a node lost what others kept",
                    expected="no user ahead of an item",
                    fix="Rebuild it: double11 features materialize ARCHIVE --store URL.",
                )
        ahead = any(int(d.max()) > self.position(s) for s, by_side in done.items() for d in by_side.values())
        return Unfinished(num_buckets=self.num_buckets, done=done) if ahead else None

    def write(self, step: Commit) -> None:
        """All sides of all buckets: items first; shadows first, as `position` goes by the others.

        A bucket that is past the whole step is left alone, and so is a shadow or a rebuild's bucket without updates.
        """
        self._check_unmoved()
        for side in _SIDES:
            for shadow in (True, False):
                self._write(step, side, shadow)

    def _check_unmoved(self) -> None:
        """Refuse before anything is written when any bucket is not as this writer knows it.

        A step is made from what several buckets held: items that count an event depend on the ids its user has seen.
        So it is not enough that each bucket refuses for itself.
        """
        at, writes = self._stored()
        for part in self._writes | writes:
            known, stored = self._at.get(part, {}), at.get(part, {})
            for source in known.keys() | stored.keys():
                if known.get(source, 0) != stored.get(source, 0):
                    raise _conflict(self._what, *source, known.get(source, 0), stored.get(source, 0))
            if self._writes[part] != writes[part]:
                raise self._overtaken(part, writes[part])

    def _overtaken(self, part: Part, writes: int) -> Conflict:
        return Conflict(
            f"bucket {part[2]} of {self._what}",
            came=f"a step upon {self._writes[part]} writes",
            expected=f"upon {writes}",
            fix="Another writer was first; start again from the stored offset.",
        )

    def _write(self, step: Commit, side: EntityKind, shadow: bool) -> None:
        entries = self._entries(step, side, shadow)
        carries_newest = side == "item" and not shadow and step.max_event_time_us > 0
        wanted = [b for b, e in enumerate(entries) if e or (b == 0 and carries_newest) or (step.offsets and not shadow)]
        parts: list[Part] = [(shadow, side, b) for b in wanted if not self._is_past((shadow, side, b), step.offsets)]
        if not parts:
            return
        with errors_of(self._what):
            pipe: Any = self._client.pipeline(transaction=False)
            for part in parts:
                pipe.execute_command("EVAL", _STEP, *self._call(part, step, entries[part[2]]))
            answers = pipe.execute()
        for part, answer in zip(parts, answers, strict=True):
            if answer and b":" in answer[0]:
                _, topic, partition = _parsed(answer[0])
                raise _conflict(self._what, topic, partition, self.position((topic, partition)), int(answer[1]))
            if answer:
                raise self._overtaken(part, int(answer[1]))
        self._writes.update(parts)
        for part in parts:
            moved = {(o.topic, o.partition): self._next(part, o) for o in step.offsets}
            self._at.setdefault(part, {}).update(moved)

    def _entries(self, step: Commit, side: EntityKind, shadow: bool) -> list[list[tuple[str, bytes]]]:
        """Keys and blobs by bucket."""
        out: list[list[tuple[str, bytes]]] = [[] for _ in range(self.num_buckets)]
        keys = self._keys[shadow]
        for update in step.all_updates:
            if side_of(update.kind) == side and update.shadow == shadow:
                buckets = partitions_of([i.encode() for i in update.ids], self.num_buckets).tolist()
                for bucket, entity_id, blob in zip(buckets, update.ids, update.blobs, strict=True):
                    out[bucket].append((keys.entity(update.kind, bucket, entity_id), blob))
        return out

    def _call(self, part: Part, step: Commit, entries: Sequence[tuple[str, bytes]]) -> list[str | bytes | int]:
        """Arguments of one EVAL."""
        shadow, side, bucket = part
        at = self._at.get(part, {})
        sources: list[str | int] = []
        for o in step.offsets:
            now = at.get((o.topic, o.partition), 0)
            sources += [f"{side[0]}:{o.topic}:{o.partition}", now, self._next(part, o)]
        newest = step.max_event_time_us if (side, bucket, shadow) == ("item", 0, False) else 0
        names, blobs = [k for k, _ in entries], [b for _, b in entries]
        off = self._keys[shadow].offsets(bucket)
        return [1 + len(names), off, *names, len(step.offsets), *sources, newest, side, self._writes[part], *blobs]

    def _next(self, part: Part, o: OffsetStep) -> int:
        return max(self._at.get(part, {}).get((o.topic, o.partition), 0), o.next)

    def _is_past(self, part: Part, steps: Sequence[OffsetStep]) -> bool:
        at = self._at.get(part, {})
        return bool(steps) and all(at.get((o.topic, o.partition), 0) >= o.next for o in steps)

    def _done(self, source: Source, shadow: bool, side: EntityKind) -> Words:
        buckets = range(self.num_buckets)
        return np.array([self._at.get((shadow, side, b), {}).get(source, 0) for b in buckets], np.int64)


class RedisRebuild:
    """Fills a namespace that nobody reads yet, then makes it the live one in one write."""

    def __init__(self, client: Client, what: str, config: RedisStoreConfig, on_switch: Callable[[], None]) -> None:
        """Namespaces that are not live, left by a rebuild that died, are dropped."""
        self._client, self._what, self._config, self._on_switch = client, what, config, on_switch
        with errors_of(what):
            stored: Any = client.hgetall(META)
            old = Meta.parse(stored, what)
            self._number: Any = client.hincrby(META, "rebuilds", 1)
            _drop(client, keep=old.live)
        self._new = _Namespace(client, what, f"{VIEW_SET}.{self._number}", old.buckets)

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities in the new namespace."""
        return self._new.load(kind, ids)

    def commit(self, step: Commit) -> None:
        """Write into the new namespace. Raises: Overloaded, Unavailable."""
        self._new.write(step)

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


def _parsed(field: bytes) -> tuple[EntityKind, str, int]:
    side, _, rest = field.decode().partition(":")
    topic, _, partition = rest.rpartition(":")
    return ("item" if side == "i" else "user"), topic, int(partition)


def _conflict(what: str, topic: str, partition: int, came: int, stored: int) -> Conflict:
    return Conflict(
        f"offset of {topic}, partition {partition}, in {what}",
        came=f"a step from {came}",
        expected=f"from {stored}, which is stored",
        fix="Another writer was first, or the server lost its last second; start again from the stored offset.",
    )
