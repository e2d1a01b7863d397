"""[heavy] What the catalogue stream does to a worker's live index: new items come, delisted and sold-out ones leave.

Shape legend: K items.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.sharded import WHOLE, Shard
from recsys.core import EventBatch, Overloaded, keys, metrics
from recsys.core.attributes import Attributes
from recsys.models.cold import ColdItems
from recsys.ranking.live import Applied, LiveCatalogue

_WAIT_S_MAX = 60.0  # for a rebuild, when the delta is full; then the follower tries again from the log
_TOLD, _DUE = "told.", "due"
Keys = npt.NDArray[np.int64]


class LiveItems:
    """Feeds a LiveIndex with what a LiveCatalogue, this worker's own, has been told."""

    def __init__(self, index: LiveIndex, encoder: ColdItems, live: LiveCatalogue, shard: Shard = WHOLE) -> None:
        """live: over the items of the run that the index has. shard: what is told of items of others is left out."""
        self._index, self._encoder, self._live, self._shard = index, encoder, live, shard
        self._due: Keys = np.empty(0, np.int64)  # told, and not in the index yet
        self._title: dict[int, str | None] = {}  # of new items in the index, as they were encoded
        self._one_moment = threading.Lock()
        self.trusted = False  # whether all that is known on the log is in the index; set by whoever feeds it

    def apply(self, batch: EventBatch) -> Applied:
        """Take N events of `catalog`; a search that begins after the return sees them.

        Raises: Overloaded when the delta stays full for a minute; the batch can be applied again.
        """
        if not self._shard.whole:
            batch = batch.filter(self._shard.holds(keys(batch.table.column("item_id").fill_null("").to_pylist())))
        with self._one_moment:
            told, changed = self._live.take(batch)
            self._due = np.union1d(self._due, changed)
            unplaced = min(self._bring_about(self._due), told.applied) if len(self._due) else 0
            self._due = self._due[:0]
        self._index.report()
        return Applied(told.applied - unplaced, told.superseded, told.unknown + unplaced)

    def num_unavailable(self) -> int:
        """Items that the stream keeps out."""
        return self._live.num_unavailable()

    def capture(self) -> dict[str, npt.NDArray[Any]]:
        """What was told, for a snapshot of the index that is taken after this."""
        with self._one_moment:
            return {_TOLD + name: array for name, array in self._live.capture().items()} | {_DUE: self._due}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """As `capture` gave it; the index is one that was taken after it."""
        self._live.restore({n.removeprefix(_TOLD): a for n, a in arrays.items() if n.startswith(_TOLD)})
        self._due = arrays.get(_DUE, self._due)  # older snapshots do not say

    def _bring_about(self, item_key: Keys) -> int:
        """Make the index hold what was told of K items; gives how many of them it cannot hold yet."""
        here, listed = self._index.has(item_key), self._live.listing(item_key)
        now, held = self._live.attributes(item_key), self._index.attributes(item_key)
        gone = here & (listed == 0)
        self._index.delete(item_key[gone])
        renamed = (now.category_key != held.category_key) | (now.brand_key != held.brand_key)
        renamed |= self._retitled(item_key, gone)
        wanted = np.flatnonzero((listed != 0) & np.where(here, renamed, listed == 1))
        placed = self._encode(item_key, now, wanted)
        same = np.setdiff1d(np.flatnonzero(here & ~gone), placed)
        self._index.update(item_key[same], price_minor=now.price_minor[same], stock_units=now.stock_units[same])
        outcomes = {
            "upserted": len(placed),
            "deleted": int(np.count_nonzero(gone)),
            "updated": len(same),
            "unplaced": len(wanted) - len(placed),
        }
        for outcome, number in outcomes.items():
            metrics.INDEX_UPDATES.labels(outcome).inc(number)
        return int(np.count_nonzero(~here & (listed != 0))) - int(np.count_nonzero(~here[placed]))

    def _encode(self, item_key: Keys, now: Attributes, wanted: Keys) -> Keys:
        """Upsert the items at `wanted` whose names place them; which those were."""
        if not len(wanted):
            return wanted
        title = self._live.titles(item_key[wanted])
        vectors, placed = self._encoder.encode(
            item_key[wanted], now.category_key[wanted], now.brand_key[wanted], now.price_minor[wanted], title
        )
        at = wanted[placed]
        self._upsert(item_key[at], vectors[placed], now.take(at))
        if self._encoder.reads_titles:
            said = zip(item_key[wanted].tolist(), title, placed.tolist(), strict=True)
            self._title |= {k: t for k, t, inside in said if inside and t is not None}
        return at

    def _retitled(self, item_key: Keys, gone: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which of K items have another title than they were encoded with; those of the run never have."""
        if not self._encoder.reads_titles:
            return np.zeros(len(item_key), np.bool_)
        for left in item_key[gone].tolist():
            self._title.pop(left, None)
        said = zip(item_key.tolist(), self._live.titles(item_key), strict=True)
        return np.array([t is not None and self._title.get(k) != t for k, t in said], np.bool_)

    def _upsert(self, item_key: Keys, vectors: npt.NDArray[np.float32], known: Attributes) -> None:
        """In parts, so that a batch greater than the delta has room; a full delta is waited for."""
        part = max(self._index.room_items_max // 2, 1)
        for at in range(0, len(item_key), part):
            some = slice(at, at + part)
            for attempt in (1, 2):
                try:
                    self._index.upsert(item_key[some], vectors[some], known.take(some))
                    break
                except Overloaded:
                    if attempt == 2 or not self._index.wait_rebuilt(_WAIT_S_MAX):
                        raise
