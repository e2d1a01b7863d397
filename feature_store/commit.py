"""What the streaming job needs of an online store, whatever it is kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from feature_store.base import FeatureReader
from feature_store.forget import FORGOTTEN
from feature_store.state import Table, Words
from recsys.core import VersionMismatch
from recsys.core.murmur2 import partitions_of

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
    """A partition's stored offset moves from `expected` (what the writer started from) to `next`."""

    topic: str
    partition: int
    expected: int
    next: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """One atomic step: feature state, seen event ids and tombstones, offsets, the largest event time."""

    updates: Sequence[Update]
    seen_event_ids: Sequence[Update] = ()
    offsets: Sequence[OffsetStep] = ()
    max_event_time_us: int = 0

    @property
    def all_updates(self) -> Sequence[Update]:
        """Every entry to write."""
        return (*self.updates, *self.seen_event_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfinished:
    """Some buckets of a store are ahead of `OnlineStore.offsets`: a step ended between two of them.

    done: by (topic, partition), then by (shadow, side), the next offset of every bucket [P]; side "item" holds items,
    side "user" everything else.
    """

    num_buckets: int
    done: Mapping[tuple[str, int], Mapping[tuple[bool, EntityKind], Words]]

    def next_offsets(self, side: EntityKind, ids: Sequence[str], source: tuple[str, int], *, shadow: bool) -> Words:
        """Next offset of a (topic, partition) in the bucket of each entity [len(ids)]: what is below is applied."""
        done = self.done.get(source, {}).get((shadow, side), np.zeros(self.num_buckets, np.int64))
        return done[partitions_of([i.encode() for i in ids], self.num_buckets)]

    def end(self, source: tuple[str, int]) -> int:
        """From this offset on every bucket takes everything."""
        return max((int(d.max()) for d in self.done.get(source, {}).values()), default=0)


class OnlineStore(FeatureReader, Protocol):
    """The one writer of a store, which is also a reader of it."""

    @property
    def store_id(self) -> str:
        """Written at creation; consumer groups are named after it."""
        ...

    def offsets(self, topic: str) -> Mapping[int, int]:
        """Next offset to read, by partition; partitions never committed are missing (read from 0)."""
        ...

    def unfinished(self) -> Unfinished | None:
        """Which entities are ahead of `offsets`, for a writer that starts there; None when none is.

        Its caller leaves out, per entity, the events that are applied already. A store of one transaction has none.
        """
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
        """All of the step or nothing of it; durable on return. What ends in between (see `unfinished`) is an error.

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


class Rebuild(Protocol):
    """A new, empty namespace beside the live one; readers see it after `switch`."""

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
