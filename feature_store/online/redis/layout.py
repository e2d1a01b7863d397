"""Where things are in Redis: the meta record, buckets and keys.

    {d11}:meta              hash: store_id, buckets (P, fixed at creation), live (NS), rebuilds (how many began), log
                            (id of the log that the offsets are of)
    {d11:NS:B}:off          hash: "SIDE:TOPIC:PARTITION" -> next offset applied to a side (u or i); "m:TOPIC:PARTITION"
                            -> mark of the items: offset of the user stage's source below which they have everything;
                            SIDE -> a random number, the name of its last write; newest -> the largest event time;
                            run -> run id of the server that writes it (see `restarts`)
    {d11:NS:B}:u:ID  :i:ID  packed state of a user, an item; :s: seen event ids and tombstone, :w: slates shown
    {d11:NS:B}:shadow-u:ID  the same of stress tests, and so on

B = murmur2(ID) mod P. NS = version of the view set, a dot, the number of the rebuild. The braces are the hash tag: a
bucket is in one slot of a cluster, its shadow too, so that one call moves all that goes with an offset.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from feature_store.commit import EntityKind, EntryKind, OffsetStep
from feature_store.views import VIEW_SET
from recsys.core import CorruptData, VersionMismatch
from recsys.core.murmur2 import partition_of, partitions_of

META = "{d11}:meta"
NEWEST = "newest"
LETTER: Mapping[EntryKind, str] = {"user": "u", "item": "i", "seen": "s", "shown": "w"}
CREATE = "if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('HSET', KEYS[1], unpack(ARGV)) end return 1"
SWITCH = """
if redis.call('HGET', KEYS[1], 'rebuilds') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'live', ARGV[1])
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], 'log') else redis.call('HSET', KEYS[1], 'log', ARGV[3]) end
return 1
"""
BIND = """
redis.call('HSETNX', KEYS[1], 'log', ARGV[1])
return redis.call('HGET', KEYS[1], 'log')
"""


@dataclass(frozen=True, slots=True)
class Meta:
    """The meta record."""

    store_id: str
    buckets: int
    live: str

    @classmethod
    def parse(cls, stored: Mapping[bytes, bytes], what: str) -> Meta:
        """Of any view set. Raises: CorruptData for a record that is not ours."""
        try:
            return cls(stored[b"store_id"].decode(), int(stored[b"buckets"]), stored[b"live"].decode())
        except (KeyError, ValueError) as error:
            raise CorruptData(
                f"{what}, {META}",
                came=f"{type(error).__name__}: {error}",
                expected="store_id, buckets and live",
                fix="Delete that key and run double11 features materialize DIR --store URL.",
            ) from error

    @classmethod
    def of(cls, stored: Mapping[bytes, bytes], what: str) -> Meta:
        """Of our view set. Raises: CorruptData for a record that is not ours; VersionMismatch for another view set."""
        meta = cls.parse(stored, what)
        views = meta.live.partition(".")[0]
        if views != VIEW_SET:
            raise VersionMismatch(
                f"feature store {what}",
                came=f"state of view set {views}",
                expected=f"view set {VIEW_SET}",
                fix="Rebuild it: double11 features materialize DIR --store URL.",
            )
        return meta


def new_meta(buckets: int) -> list[str]:
    """Fields of an empty store, for CREATE."""
    return ["store_id", uuid.uuid4().hex[:12], "buckets", str(buckets), "live", f"{VIEW_SET}.0", "rebuilds", "0"]


def side_of(kind: EntryKind) -> EntityKind:
    """Items move apart from everything that is kept by user."""
    return "item" if kind == "item" else "user"


def field_of(o: OffsetStep) -> tuple[int, str]:
    """Bucket and field of an offset or mark."""
    if o.bucket is not None:
        return o.bucket, f"m:{o.topic}:{o.partition}"
    return o.partition, f"{o.side[0]}:{o.topic}:{o.partition}"


Group = tuple[int, list[int], list[str]]


class Keys:
    """Keys of one namespace."""

    def __init__(self, ns: str, num_buckets: int) -> None:
        self.num_buckets = num_buckets
        self._tags = [f"{{d11:{ns}:{b}}}" for b in range(num_buckets)]

    def offsets(self, bucket: int) -> str:
        """Key of a bucket's offsets."""
        return f"{self._tags[bucket]}:off"

    def of(self, kind: EntryKind, ids: Sequence[str]) -> tuple[list[str], list[int]]:
        """Keys and buckets of the entities of one request: the same ids come often, so their buckets are cached."""
        tags, letter, n = self._tags, LETTER[kind], self.num_buckets
        buckets = [partition_of(i.encode(), n) for i in ids]
        return [f"{tags[b]}:{letter}:{i}" for b, i in zip(buckets, ids, strict=True)], buckets

    def grouped(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[Group]:
        """Many entities by bucket: its number, their places among `ids`, their keys."""
        if not ids:
            return []
        buckets = partitions_of([i.encode() for i in ids], self.num_buckets)
        order = np.argsort(buckets, kind="stable")
        found, first = np.unique(buckets[order], return_index=True)
        letter = f":{'shadow-' if shadow else ''}{LETTER[kind]}:"
        out = []
        for bucket, at in zip(found.tolist(), np.split(order, first[1:]), strict=True):
            places, prefix = at.tolist(), self._tags[bucket] + letter
            out.append((bucket, places, [prefix + ids[i] for i in places]))
        return out
