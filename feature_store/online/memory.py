"""MemoryStore: feature state in this process. Training and replay fold a dataset into it and read as they go."""

from __future__ import annotations

from collections.abc import Sequence

from feature_store.base import ItemFeatures, UserFeatures
from feature_store.columns import EventColumns
from feature_store.fold import fold
from feature_store.read import item_features, user_features
from feature_store.state import decode, encode
from feature_store.view import Views
from feature_store.views import ITEM, USER, VIEW_SET
from recsys.core import Deadline, EventBatch

_PENDING_ROWS_MAX = 1 << 18


class MemoryStore:
    """A FeatureReader that is filled by `apply`. Not for use from several threads."""

    def __init__(self) -> None:
        self._blobs: dict[str, dict[str, bytes]] = {"user": {}, "item": {}}
        self._pending: list[EventBatch] = []
        self._pending_rows = 0
        self._max_event_time_us = 0

    @property
    def view_set(self) -> str:
        """Version of the view set."""
        return VIEW_SET

    def apply(self, batch: EventBatch) -> None:
        """Add events, each once and in any order. Folding waits until the next read or until enough have come."""
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
        self._fold_pending()
        return user_features(user_id, self._blobs["user"].get(user_id, b""), as_of_us)

    async def items(self, item_ids: Sequence[str], as_of_us: int, deadline: Deadline) -> ItemFeatures:
        """Features of N items. Raises: DeadlineExceeded."""
        deadline.require("features of items")
        self._fold_pending()
        known = self._blobs["item"]
        return item_features([known.get(i, b"") for i in item_ids], as_of_us)

    def _fold_pending(self) -> None:
        if not self._pending:
            return
        events = EventColumns.of(EventBatch.concat(self._pending))
        self._pending, self._pending_rows = [], 0
        for views, ids in ((USER, events.user_ids), (ITEM, events.item_ids)):
            self._fold(views, ids, events)

    def _fold(self, views: Views, ids: list[str], events: EventColumns) -> None:
        known = self._blobs[views.kind]
        state = fold(views, decode(views.tables, [known.get(i, b"") for i in ids]), events)
        known.update(zip(ids, encode(state), strict=True))
