"""Items that the catalogue stream has named and the run does not know: a bounded number, with what they are called.

Shape legend: N events or keys, A arrivals.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, field

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns
from recsys.core import EventBatch, key
from recsys.core.logging import get_logger
from recsys.ranking.told import LISTED, Arrays, Mask, Rows, Told

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
    row_by_key: dict[int, int] = field(default_factory=dict)
    names: list[Names] = field(default_factory=list)

    def rows(self, item_key: Keys) -> Rows:
        """Row of each key [N], -1 where there is none."""
        held = self.row_by_key
        return np.fromiter((held.get(k, -1) for k in item_key.tolist()), np.int64, len(item_key))


class Arrivals:
    """Written by one thread, read by others. An arrival may be shown once the stream has listed it."""

    def __init__(self, items_max: int) -> None:
        """items_max: rows; when all are taken, those of delisted items are given away."""
        self._items_max = items_max
        self._table = _Table(Told(0, available=False))
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
        table = self._table
        newer, described = table.told.take(events, row, row >= 0)
        columns = [batch.table.column(n).take(described).to_pylist() for n in ("title", "category", "brand")]
        for place, *said in zip(described.tolist(), *columns, strict=True):
            names = table.names[row[place]]
            for name, text in zip(("title", "category", "brand"), said, strict=True):
                if text:
                    setattr(names, name, text)
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
        self._table = _Table(told, {key(n.item_id): row for row, n in enumerate(names)}, names)

    def _rows_for(self, events: EventColumns, at: Rows) -> Rows:
        """Rows of the items that the events `at` name, new ones made; -1 where there is no room."""
        unseen = np.unique(events.item_code[at][self._table.rows(events.item_key[at]) < 0])
        self._make_room(len(unseen))
        table = self._table
        for code in unseen[: len(table.told) - len(table.names)].tolist():
            item_id = events.item_ids[code]
            table.names.append(Names(item_id))
            table.row_by_key[key(item_id)] = len(table.names) - 1
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
        self._replace(there if worth else np.arange(taken), self._items_max)
        if not worth and not self._is_full:
            self._is_full = True
            fix = "train a run that knows these items, or raise serving.catalog.new_items_max"
            _log.error("new_items_full", items_max=self._items_max, fix=fix)

    def _replace(self, rows: Rows, num_rows: int) -> None:
        old = self._table
        row_by_key, names = {}, []
        place = {row: new for new, row in enumerate(rows.tolist())}
        for item_key, row in old.row_by_key.items():
            if row in place:
                row_by_key[item_key] = place[row]
        names = [old.names[row] for row in place]
        self._table = _Table(old.told.copied(rows, num_rows), row_by_key, names)
