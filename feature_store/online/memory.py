"""MemoryStore: feature state in this process. Training and replay fold a dataset into it and read as they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from feature_store.base import ItemFeatures, UserFeatures
from feature_store.commit import Commit, EntryKind, other_log
from feature_store.read import item_features, user_features
from feature_store.update import archived_updates
from feature_store.views import VIEW_SET
from recsys.core import Conflict, Deadline, EventBatch

_PENDING_ROWS_MAX = 1 << 18


class MemoryStore:
    """An OnlineStore without durability; `apply` fills it from a dataset. Not for use from several threads."""

    def __init__(self) -> None:
        self._blobs: dict[tuple[EntryKind, bool], dict[str, bytes]] = {}
        self._offsets: dict[str, dict[int, int]] = {}
        self._pending: list[EventBatch] = []
        self._pending_rows = 0
        self._max_event_time_us = 0
        self._log_id = ""

    @property
    def view_set(self) -> str:
        """Version of the view set."""
        return VIEW_SET

    @property
    def store_id(self) -> str:
        """There is one per process."""
        return "memory"

    def apply(self, batch: EventBatch) -> None:
        """Add events of a dataset, each once and in any order; those marked late or stress are left out.

        Folding waits until the next read or until enough have come.
        """
        if not len(batch):
            return
        self._pending.append(batch)
        self._pending_rows += len(batch)
        self._max_event_time_us = max(self._max_event_time_us, int(batch.numpy("event_time").max()))
        if self._pending_rows >= _PENDING_ROWS_MAX:
            self._fold_pending()

    def max_event_time_us(self) -> int:
        """The largest event time applied, microseconds UTC; 0 when empty."""
        return self._max_event_time_us

    async def user(self, user_id: str, as_of_us: int, deadline: Deadline) -> UserFeatures:
        """All features of one user. Raises: DeadlineExceeded."""
        deadline.require("features of a user")
        return user_features(user_id, self.load("user", [user_id])[0], as_of_us)

    async def items(self, item_ids: Sequence[str], as_of_us: int, deadline: Deadline) -> ItemFeatures:
        """Features of N items. Raises: DeadlineExceeded."""
        deadline.require("features of items")
        return item_features(self.load("item", item_ids), as_of_us)

    def offsets(self, topic: str) -> Mapping[int, int]:
        """Next offset to read, by partition."""
        return dict(self._offsets.get(topic, {}))

    def load(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities, b"" for unknown ones."""
        self._fold_pending()
        known = self._blobs.get((kind, shadow), {})
        return [known.get(i, b"") for i in ids]

    def bind(self, log_id: str) -> None:
        """Say which log the offsets are of. Raises: VersionMismatch."""
        self._log_id = self._log_id or log_id
        if self._log_id != log_id:
            raise other_log("memory store", log_id, self._log_id)

    def commit(self, step: Commit) -> None:
        """Take the whole step. Raises: Conflict when a stored offset is not the expected one."""
        for o in step.offsets:
            stored = self._offsets.get(o.topic, {}).get(o.partition, 0)
            if stored != o.expected:
                raise Conflict(
                    f"offset of {o.topic}, partition {o.partition}",
                    came=f"a step from {o.expected}",
                    expected=f"from {stored}, which is stored",
                    fix="Read the offsets again and go on from there.",
                )
        for o in step.offsets:
            self._offsets.setdefault(o.topic, {})[o.partition] = o.next
        for update in step.all_updates:
            known = self._blobs.setdefault((update.kind, update.shadow), {})
            known.update(zip(update.ids, update.blobs, strict=True))
        self._max_event_time_us = max(self._max_event_time_us, step.max_event_time_us)

    def close(self) -> None:
        """Nothing to let go of."""

    def _fold_pending(self) -> None:
        if not self._pending:
            return
        batch = EventBatch.concat(self._pending)
        self._pending, self._pending_rows = [], 0  # before loading, which would fold again
        updates, tombstones = archived_updates(self.load, batch)
        self.commit(Commit(updates=updates, seen_event_ids=tombstones))
