"""[heavy] What the catalogue stream does to a worker's live index: new items come, delisted and sold-out ones leave.

Shape legend: N events, K items that a batch names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns
from recsys.candidates.nearest.live import LiveIndex
from recsys.core import EventBatch, EventKind, Overloaded, metrics
from recsys.core.attributes import Attributes, attributes_of
from recsys.core.ids import key
from recsys.core.items import ItemTable
from recsys.models.cold import ColdItems
from recsys.ranking.live import Applied

_PRICE, _STOCK, _LISTED = range(3)
_UNSAID = -1
_WAIT_S_MAX = 60.0  # for a rebuild, when the delta is full; then the follower tries again from the log
Keys = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Told:
    """What the stream has said of one item; said[f] and when[f] by field; encoded: names its vector was made from."""

    said: list[int] = field(default_factory=lambda: [_UNSAID] * 3)
    when: list[tuple[int, int, int]] = field(default_factory=lambda: [(_UNSAID, _UNSAID, _UNSAID)] * 3)
    category: int = _UNSAID
    brand: int = _UNSAID
    encoded: tuple[int, int] | None = None


class LiveItems:
    """Feeds a LiveIndex. As in the features, the greatest (event_time, event_id) wins per field.

    Memory: one small record per item that the stream has named.
    """

    def __init__(self, index: LiveIndex, encoder: ColdItems, items: ItemTable) -> None:
        """items: of the run that the index and the encoder are of."""
        self._index, self._encoder, self._items = index, encoder, items
        self._told: dict[int, _Told] = {}
        self.trusted = False  # whether all that is known on the log is in the index; set by whoever feeds it

    def apply(self, batch: EventBatch) -> Applied:
        """Take N events of `catalog`; a search that begins after the return sees them.

        Raises: Overloaded when the delta stays full for a minute; the batch can be applied again.
        """
        events = EventColumns.of(batch)
        changed, superseded = set[int](), 0
        for i in range(len(events)):
            if self._hear(events, i):
                changed.add(int(events.item_key[i]))
            else:
                superseded += 1
        unknown = self._bring_about(np.array(sorted(changed), np.int64)) if changed else 0
        self._index.report()
        return Applied(len(events) - superseded - unknown, superseded, unknown)

    def num_unavailable(self) -> int:
        """Items that the stream keeps out."""
        return sum(0 in (t.said[_STOCK], t.said[_LISTED]) for t in self._told.values())

    def _hear(self, events: EventColumns, i: int) -> bool:
        """Note what one event says; True when it is news."""
        kind, item_key = int(events.kind[i]), int(events.item_key[i])
        if kind not in (EventKind.PRICE, EventKind.STOCK, EventKind.ITEM):
            return False
        told = self._told.get(item_key) or self._first(item_key)
        news = False
        for which, column in ((_PRICE, events.price), (_STOCK, events.stock), (_LISTED, events.listed)):
            value = int(column[i])
            when = (int(events.time_us[i]), int(events.event_key[i]), value)
            if value >= 0 and when > told.when[which]:
                told.said[which], told.when[which], news = value, when, True
                if which == _LISTED:
                    told.category = int(events.category[i]) if events.category[i] >= 0 else told.category
                    told.brand = int(events.brand[i]) if events.brand[i] >= 0 else told.brand
        return news

    def _first(self, item_key: int) -> _Told:
        told = self._told[item_key] = _Told()
        one = np.array([item_key], np.int64)
        if self._items.rows(one)[0] >= 0:  # an item of the run: its vector is made from what the run knew
            names = [self._items.values(column, one)[0] for column in ("category", "brand")]
            told.category, told.brand = (key(name) if name else _UNSAID for name in names)
            told.encoded = told.category, told.brand
        return told

    def _bring_about(self, item_key: Keys) -> int:
        """Make the index hold what was told of K items; gives how many of them it cannot hold yet."""
        told = [self._told[k] for k in item_key.tolist()]
        here = self._index.has(item_key)
        listed = np.array([t.said[_LISTED] for t in told])
        self._index.delete(item_key[here & (listed == 0)])
        wrong = np.array([t.encoded != (t.category, t.brand) for t in told])
        wanted = np.flatnonzero((listed != 0) & np.where(here, wrong, listed == 1))
        placed = self._encode(item_key, told, wanted)
        same = np.setdiff1d(np.flatnonzero(here & (listed != 0)), placed)
        for which, name in ((_PRICE, "price_minor"), (_STOCK, "stock_units")):
            said = np.array([t.said[which] for t in told], np.int64)
            some = same[said[same] >= 0]
            self._index.update(item_key[some], **{name: said[some]})
        outcomes = {
            "upserted": len(placed),
            "deleted": int(np.count_nonzero(here & (listed == 0))),
            "updated": len(same),
            "unplaced": len(wanted) - len(placed),
        }
        for outcome, number in outcomes.items():
            metrics.INDEX_UPDATES.labels(outcome).inc(number)
        return int(np.count_nonzero(~here & (listed != 0))) - int(np.count_nonzero(~here[placed]))

    def _encode(self, item_key: Keys, told: list[_Told], wanted: Keys) -> Keys:
        """Upsert the items at `wanted` whose names place them; which those were."""
        if not len(wanted):
            return wanted
        category, brand = (np.array([getattr(told[i], n) for i in wanted], np.int64) for n in ("category", "brand"))
        vectors, placed = self._encoder.encode(item_key[wanted], category, brand)
        at = wanted[placed]
        known = attributes_of(self._items, item_key[at])
        known.category_key[:], known.brand_key[:] = np.maximum(category[placed], 0), np.maximum(brand[placed], 0)
        for which, column in ((_PRICE, known.price_minor), (_STOCK, known.stock_units)):
            said = np.array([told[i].said[which] for i in at], np.int64)
            np.copyto(column, said, where=said >= 0)
        self._upsert(item_key[at], vectors[placed], known)
        for i in at.tolist():
            told[i].encoded = told[i].category, told[i].brand
        return at

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
