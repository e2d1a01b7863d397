"""Items that the catalogue stream has named and the run does not know: a bounded number, with what they are called.

Shape legend: N events or keys, A arrivals.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, field

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns
from recsys.core import EventBatch, key, keys
from recsys.core.logging import get_logger
from recsys.ranking.told import LISTED, UNSAID, Arrays, Mask, Rows, Told

_log = get_logger(__name__)
_FIRST_ROWS = 256
_WORTH_A_SWEEP = 16  # a full table is swept when one row in so many is of a delisted item
Keys = npt.NDArray[np.int64]


@dataclass(slots=True)
class Names:
    """Of one arrival, as last told."""

    item_id: str
    title: str | None = None
    category: str | None = None
    brand: str | None = None


@dataclass(slots=True)
class _Table:
    """Replaced as a whole when it grows or is swept: a reader keeps what it began with."""

    told: Told
    item_key: Keys
    row_by_key: dict[int, int] = field(default_factory=dict)
    names: list[Names] = field(default_factory=list)
    newest: Rows = field(default_factory=lambda: np.empty(0, np.int64))  # replaced, never written: readers slice it

    def rows(self, item_key: Keys) -> Rows:
        """Row of each key [N], -1 where there is none."""
        held = self.row_by_key
        return np.fromiter((held.get(k, -1) for k in item_key.tolist()), np.int64, len(item_key))

    def on_sale_since(self, rows: Rows) -> Rows:
        """When each of the rows was listed, UNSAID where it may not be sold: what decides its place in `newest`."""
        return np.where(self.told.available[rows], self.told.time_us(LISTED)[rows], UNSAID)

    def place(self, moved: Rows) -> None:
        """Take the rows out of `newest`, and put those that may be sold where they belong: the newest first, then by
        key. Others keep their order, so that one change among many is no new sort.
        """
        is_moved = np.zeros(len(self.told), np.bool_)
        is_moved[moved] = True
        kept, here = self.newest[~is_moved[self.newest]], moved[self.told.available[moved]]
        since_us = self.told.time_us(LISTED)
        here = here[np.lexsort((self.item_key[here], -since_us[here]))]
        age, at = -since_us[kept], -since_us[here]
        first, end = np.searchsorted(age, at, side="left"), np.searchsorted(age, at, side="right")
        kept_key, key_here = self.item_key[kept], self.item_key[here]
        for i in np.flatnonzero(first < end).tolist():
            first[i] += np.searchsorted(kept_key[first[i] : end[i]], key_here[i])
        self.newest = np.insert(kept, first, here)


class Arrivals:
    """Written by one thread, read by others. An arrival may be shown once the stream has listed it."""

    def __init__(self, items_max: int) -> None:
        """items_max: rows; when all are taken, those of delisted items are given away."""
        self._items_max = items_max
        self._table = _Table(Told(0, available=False), np.empty(0, np.int64))
        self._is_full = False

    def __len__(self) -> int:
        return len(self._table.names)

    def table(self) -> _Table:
        """What stands now; take it once per question."""
        return self._table

    def take(self, batch: EventBatch, events: EventColumns, at: Rows) -> tuple[Mask, int]:
        """Hear the events `at` of a batch of N; which events were news [N], and how many found no room."""
        row = np.full(len(events), -1, np.int64)
        row[at] = self._rows_for(events, at)
        table, named = self._table, np.unique(row[row >= 0])
        before = table.on_sale_since(named)
        newer, described = table.told.take(events, row, row >= 0)
        columns = [batch.table.column(n).take(described).to_pylist() for n in ("title", "category", "brand")]
        for place, *said in zip(described.tolist(), *columns, strict=True):
            names = table.names[row[place]]
            for name, text in zip(("title", "category", "brand"), said, strict=True):
                if text:
                    setattr(names, name, text)
        moved = named[table.on_sale_since(named) != before]
        if len(moved):
            table.place(moved)
        return newer, int(np.count_nonzero(row[at] < 0))

    def capture(self) -> Arrays:
        """What was told of arrivals, and what they are called."""
        table = self._table
        names = json.dumps([astuple(names) for names in table.names]).encode()
        return {"names": np.frombuffer(names, np.uint8), **table.told.capture()}

    def restore(self, arrays: Arrays) -> None:
        """As `capture` gave it."""
        names = [Names(*fields) for fields in json.loads(arrays["names"].tobytes())]
        told = Told(len(names), available=False)
        told.restore(arrays)
        item_key = keys(n.item_id for n in names)
        self._table = _Table(told, item_key, {k: row for row, k in enumerate(item_key.tolist())}, names)
        self._table.place(np.arange(len(names)))

    def _rows_for(self, events: EventColumns, at: Rows) -> Rows:
        """Rows of the items that the events `at` name, new ones made; -1 where there is no room."""
        unseen = np.unique(events.item_code[at][self._table.rows(events.item_key[at]) < 0])
        self._make_room(len(unseen))
        table = self._table
        for code in unseen[: len(table.told) - len(table.names)].tolist():
            item_id, row = events.item_ids[code], len(table.names)
            table.names.append(Names(item_id))
            table.item_key[row] = key(item_id)
            table.row_by_key[key(item_id)] = row
        return table.rows(events.item_key[at])

    def _make_room(self, wanted: int) -> None:
        table, taken = self._table, len(self._table.names)
        if taken + wanted <= len(table.told):
            return
        if taken + wanted <= self._items_max:
            self._replace(np.arange(taken), min(max(_FIRST_ROWS, 2 * (taken + wanted)), self._items_max))
            return
        there = np.flatnonzero(table.told.value[LISTED, :taken] != 0)
        worth = taken - len(there) >= max(self._items_max // _WORTH_A_SWEEP, 1)
        if worth or len(table.told) < self._items_max:
            self._replace(there if worth else np.arange(taken), self._items_max)
        if not worth and not self._is_full:
            self._is_full = True
            fix = "train a run that knows these items, or raise serving.catalog.new_items_max"
            _log.error("new_items_full", items_max=self._items_max, fix=fix)

    def _replace(self, rows: Rows, num_rows: int) -> None:
        old, kept = self._table, len(rows)
        item_key, new_row = np.zeros(num_rows, np.int64), np.full(len(old.told), -1)
        item_key[:kept], new_row[rows] = old.item_key[rows], np.arange(kept)
        row_by_key = {k: row for row, k in enumerate(item_key[:kept].tolist())}
        names = [old.names[row] for row in rows.tolist()]
        # What may be sold is listed, so that no row of `newest` is swept.
        self._table = _Table(old.told.copied(rows, num_rows), item_key, row_by_key, names, new_row[old.newest])
