"""What the streaming job needs of an online store, whatever it is kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from feature_store.base import FeatureReader
from feature_store.forget import FORGOTTEN
from feature_store.state import Table

EntryKind = Literal["user", "item", "seen", "shown"]

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


class OnlineStore(FeatureReader, Protocol):
    """The one writer of a store, which is also a reader of it."""

    @property
    def store_id(self) -> str:
        """Written at creation; consumer groups are named after it."""
        ...

    def offsets(self, topic: str) -> Mapping[int, int]:
        """Next offset to read, by partition; partitions never committed are missing (read from 0)."""
        ...

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities, b"" for unknown ones. Raises: Unavailable."""
        ...

    def commit(self, step: Commit) -> None:
        """All of the step or nothing of it; durable on return.

        Raises: Conflict when a stored offset is not the expected one; Overloaded when the store is full.
        """
        ...

    def close(self) -> None:
        """Let go of the store and of the writer's lock."""
        ...
