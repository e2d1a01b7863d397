"""What the catalogue stream says about a run's items now: price, stock, whether they are listed.

Kept beside the feature store, so that what is sold out stays out of slates also where the store is late or away.
Shape legend: N events or candidates, M items of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns
from recsys.core import EventBatch, EventKind
from recsys.core.items import ItemTable

Keys = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_UNSAID = -1
_PRICE, _STOCK, _LISTED = range(3)
_NUM_FIELDS = 3


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of N catalogue events: changed something, said nothing newer, named no item of the run."""

    applied: int = 0
    superseded: int = 0
    unknown: int = 0


class LiveCatalogue:
    """Latest value per known item and field, whatever the order of arrival. 80 bytes an item, none for others.

    One thread applies while others ask: each item changes from its old state to its new one at once.
    """

    def __init__(self, items: ItemTable) -> None:
        """items: the run's; all count as available until the stream says otherwise."""
        self._items = items
        shape = (_NUM_FIELDS, len(items) + 1)  # the last column is for items unknown to the run: row -1
        self._value = np.full(shape, _UNSAID, np.int64)
        self._time_us = np.full(shape, _UNSAID, np.int64)
        self._event_key = np.full(shape, _UNSAID, np.int64)
        self._available = np.ones(len(items) + 1, np.bool_)
        self.trusted = False  # whether all that is known on the log is known here; set by whoever feeds it

    def apply(self, batch: EventBatch) -> Applied:
        """Take N events of `catalog`; the greatest (event_time, event_id) wins per field, as in `feature_store.views`.

        A repeat changes nothing. Events that are no price, stock or item change are superseded by definition.
        """
        events = EventColumns.of(batch)
        row = self._items.rows(events.item_key)
        told = np.isin(events.kind, (EventKind.PRICE, EventKind.STOCK, EventKind.ITEM))
        newer = np.zeros(len(row), np.bool_)
        for field, said in ((_PRICE, events.price), (_STOCK, events.stock), (_LISTED, events.listed)):
            newer[self._keep_latest(field, row, events, said, np.flatnonzero(told & (row >= 0) & (said >= 0)))] = True
        changed = row[newer]
        self._available[changed] = (self._value[_STOCK, changed] != 0) & (self._value[_LISTED, changed] != 0)
        unknown = int(np.count_nonzero(told & (row < 0)))
        applied = int(np.count_nonzero(newer))
        return Applied(applied, len(row) - applied - unknown, unknown)

    def available(self, item_key: Keys) -> Mask:
        """True [N] unless the stream says sold out or delisted."""
        return self._available[self._items.rows(item_key)]

    def says_stock(self, item_key: Keys) -> Mask:
        """True [N] where the stream has named a stock."""
        return np.asarray(self._value[_STOCK, self._items.rows(item_key)] != _UNSAID)

    def says_listed(self, item_key: Keys) -> Mask:
        """True [N] where the stream has said listed or delisted."""
        return np.asarray(self._value[_LISTED, self._items.rows(item_key)] != _UNSAID)

    def price(self, item_key: Keys) -> npt.NDArray[np.int64]:
        """Price in minor units [N], -1 where the stream has named none."""
        return np.asarray(self._value[_PRICE, self._items.rows(item_key)], np.int64)

    def num_unavailable(self) -> int:
        """Items that are kept out."""
        return len(self._available) - int(np.count_nonzero(self._available))

    def _keep_latest(self, field: int, row: Keys, events: EventColumns, said: Keys, at: Keys) -> Keys:
        """Write the newest of the events `at` per item where it is newer than what is kept; which those were."""
        order = np.lexsort((said[at], events.event_key[at], events.time_us[at], row[at]))
        at = at[order]
        at = at[np.append(row[at][1:] != row[at][:-1], True)[: len(at)]]
        mine = row[at]
        rank = np.stack([events.time_us[at], events.event_key[at], said[at]])
        kept = np.stack([self._time_us[field, mine], self._event_key[field, mine], self._value[field, mine]])
        differs = rank != kept
        first = differs.argmax(axis=0)  # where the two first differ decides
        columns = np.arange(len(at))
        newer = differs.any(axis=0) & (rank[first, columns] > kept[first, columns])
        at, mine = at[newer], mine[newer]
        self._time_us[field, mine], self._event_key[field, mine] = events.time_us[at], events.event_key[at]
        self._value[field, mine] = said[at]
        return at
