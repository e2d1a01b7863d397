"""What the streaming job needs of an online store, whatever it is kept in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeGuard

from feature_store.base import FeatureReader
from feature_store.forget import FORGOTTEN
from feature_store.state import Table
from recsys.core import VersionMismatch

EntryKind = Literal["user", "item", "seen", "shown"]
EntityKind = Literal["user", "item"]

SEEN_MAX = 1024
SEEN = Table(name="seen", key=("time_us", "event_key"), keep=(SEEN_MAX,), group_shift=63)
# The tables of kinds "seen" (ids of a user's events, tombstone) and "shown" (request ids of a user's slates).
DELIVERY: tuple[Table, ...] = (SEEN, FORGOTTEN)


@dataclass(frozen=True, slots=True)
class Update:
    """New packed state of some entities; b"" deletes one. shadow: of the stress test's own namespace."""

    kind: EntryKind
    ids: Sequence[str]
    blobs: Sequence[bytes]
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class OffsetStep:
    """A partition's stored offset moves from `expected` (what the writer started from) to `next`.

    side, bucket: where a store of buckets keeps it; other stores keep one offset per (topic, partition). The offset of
    what a bucket's side reads itself is in the bucket of the partition's number (bucket None): `events` and
    `impressions` on side "user", `item-updates` and `catalog` on side "item". With a bucket it is a mark of that
    bucket's items: the offset of (topic, partition) below which they have everything that the user stage sent them.
    """

    topic: str
    partition: int
    expected: int
    next: int
    side: EntityKind = "user"
    bucket: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """One step: feature state, seen event ids and tombstones, offsets, the largest event time. Atomic as a whole, in a
    store of buckets per side of a bucket.
    """

    updates: Sequence[Update]
    seen_event_ids: Sequence[Update] = ()
    offsets: Sequence[OffsetStep] = ()
    max_event_time_us: int = 0

    @property
    def all_updates(self) -> Sequence[Update]:
        """Every entry to write."""
        return (*self.updates, *self.seen_event_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """What one side of one bucket has come to: next offsets of what it reads, and marks (see OffsetStep)."""

    offsets: Mapping[tuple[str, int], int] = field(default_factory=dict)
    marks: Mapping[tuple[str, int], int] = field(default_factory=dict)


class OnlineStore(FeatureReader, Protocol):
    """A writer of a store, which is also a reader of it. The only one, unless it is a BucketStore."""

    @property
    def store_id(self) -> str:
        """Written at creation; consumer groups are named after it."""
        ...

    def offsets(self, topic: str) -> Mapping[int, int]:
        """Next offset to read, by partition; partitions never committed are missing (read from 0)."""
        ...

    def bind(self, log_id: str) -> None:
        """Say which log the offsets are of: kept by the first who says it, until a rebuild.

        Raises: VersionMismatch when they are of another log; Unavailable.
        """
        ...

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities, b"" for unknown ones. Raises: Unavailable."""
        ...

    def commit(self, step: Commit) -> None:
        """All of the step or nothing of it (`BucketStore`: per side of a bucket); durable on return.

        Raises: Conflict when a stored offset is not the expected one; Overloaded when the store is full; Unavailable.
        """
        ...

    def close(self) -> None:
        """Let go of the store and of the writer's lock."""
        ...


def other_log(what: str, came: str, expected: str) -> VersionMismatch:
    """The error of `bind`."""
    return VersionMismatch(
        what,
        came=f"log {came}",
        expected=f"log {expected}, which its offsets are of",
        fix="Ingest that log, write to another store, or rebuild from an archive of this log: "
        "double11 features materialize ARCHIVE --store URL.",
    )


class BucketStore(OnlineStore, Protocol):
    """What a store of buckets adds: several writers, each of some sides of some buckets (ADR 8).

    Bucket = murmur2(id) modulo `num_buckets`. Its sides, items and what is kept by user, move each by itself, in one
    call with the offsets that brought it there. A commit is refused unless the side is as this writer claimed or
    committed it last; the offsets alone would not tell a side that was lost and written again.
    """

    what: str  # how its errors name it

    @property
    def num_buckets(self) -> int:
        """P, fixed when the store was created."""
        ...

    def namespace(self) -> str:
        """Names this store and its live namespace among all; another one's item updates are not for it."""
        ...

    def claim(self, side: EntityKind, buckets: Iterable[int]) -> Mapping[int, Position]:
        """What has been applied to one side of some buckets, read anew; commits to them follow from it.

        Raises: Unavailable, VersionMismatch.
        """
        ...

    def verify(self, side: EntityKind, buckets: Iterable[int]) -> None:
        """Return if nobody has written since, and nothing was lost: what was loaded meanwhile is of one piece.

        Raises: Conflict, Unavailable.
        """
        ...


def has_buckets(store: OnlineStore) -> TypeGuard[BucketStore]:
    """Whether a store moves bucket by bucket; the others take a step as one transaction, from one writer."""
    return hasattr(store, "claim")


class Rebuild(Protocol):
    """A new, empty namespace beside the live one; readers see it after `switch`.

    Streaming goes on in it from the offsets that its commits carry: of (events, p) and (impressions, p), side "user",
    and of (catalog, q), side "item", `expected` being what this rebuild gave before (0 at first). A store of buckets
    takes the user stage's offsets for the marks of all its items too: they were folded from the same events. So
    `item-updates` needs no offset; it is read from its beginning, and what belongs to the old namespace left out.
    """

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities in the new namespace. Raises: Unavailable."""
        ...

    def commit(self, step: Commit) -> None:
        """Write into the new namespace. Raises: Overloaded, Unavailable."""
        ...

    def switch(self, log_id: str = "") -> None:
        """Make the new namespace the live one in one write, then drop the old one. log_id: as `OnlineStore.bind`.

        Raises: Conflict when another rebuild began after this one.
        """
        ...

    def close(self) -> None:
        """Give up what was not switched to; another rebuild may begin."""
        ...


class Rebuildable(Protocol):
    """Where a rebuild begins, also beside a writer at work: its next step after the switch is a Conflict."""

    def rebuild(self) -> Rebuild:
        """Begin a rebuild; what an earlier one has left is dropped. Raises: Conflict while another is at work."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...


class DurableStore(OnlineStore, Rebuildable, Protocol):
    """A store that outlives its process."""


class DurableReader(FeatureReader, Protocol):
    """A reader of a durable store, in any process."""

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities, b"" for unknown ones. Raises: Unavailable."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...
