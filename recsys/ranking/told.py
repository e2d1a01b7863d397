"""What a stream has told of items, by row: the newest value per field, whatever the order of arrival.

Shape legend: R rows, N events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Arrays = Mapping[str, npt.NDArray[Any]]
UNSAID = -1
PRICE, STOCK, LISTED = range(3)
_NUM_FIELDS = 3
_COLUMNS = ("value", "_time_us", "_event_key", "category_key", "brand_key", "available")


class Told:
    """R rows; 88 bytes a row. One thread takes events while others read: each field changes at once."""

    def __init__(self, num_rows: int, *, available: bool) -> None:
        """available: whether an item counts as listed until something is said of it."""
        self.value = np.full((_NUM_FIELDS, num_rows), UNSAID, np.int64)
        self._time_us = np.full((_NUM_FIELDS, num_rows), UNSAID, np.int64)
        self._event_key = np.full((_NUM_FIELDS, num_rows), UNSAID, np.int64)
        self.category_key, self.brand_key = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        self.available = np.full(num_rows, available)
        self._listed_min = UNSAID if available else 1  # what `listed` must at least be; 0 keeps out anyway

    def __len__(self) -> int:
        return len(self.available)

    def time_us(self, field: int) -> Rows:
        """When what is known of a field was so [R], microseconds UTC; UNSAID where nothing was said."""
        when: Rows = self._time_us[field]
        return when

    def copied(self, rows: Rows, num_rows: int) -> Told:
        """The given rows first, then untold ones up to `num_rows`."""
        made, kept = Told(num_rows, available=self._listed_min == UNSAID), slice(0, len(rows))
        for name in ("value", "_time_us", "_event_key"):
            getattr(made, name)[:, kept] = getattr(self, name)[:, rows]
        for name in ("category_key", "brand_key", "available"):
            getattr(made, name)[kept] = getattr(self, name)[rows]
        return made

    def capture(self) -> Arrays:
        """What was told, by row; rows of which nothing was said are left out."""
        rows = np.flatnonzero((self.value != UNSAID).any(axis=0))
        return {"rows": rows} | {name: getattr(self, name)[..., rows] for name in _COLUMNS}

    def restore(self, arrays: Arrays) -> None:
        """As `capture` gave it, into rows that were told nothing."""
        for name in _COLUMNS:
            getattr(self, name)[..., arrays["rows"]] = arrays[name]

    def take(self, events: EventColumns, row: Rows, told: Mask) -> tuple[Mask, Rows]:
        """Hear the events that are `told` [N] of the rows [N]; the greatest (event_time, event_id) wins per field.

        Gives which events were news [N], and the places of those that say what an item is.
        """
        newer = np.zeros(len(row), np.bool_)
        for field, said in ((PRICE, events.price), (STOCK, events.stock), (LISTED, events.listed)):
            at = self._keep_latest(field, row, events, said, np.flatnonzero(told & (said >= 0)))
            newer[at] = True
        described = at  # by a listing: the last of the fields
        for column, named in ((self.category_key, events.category), (self.brand_key, events.brand)):
            at = described[named[described] >= 0]
            column[row[at]] = named[at]
        changed, listed = row[newer], self.value[LISTED]
        self.available[changed] = (
            (self.value[STOCK, changed] != 0) & (listed[changed] != 0) & (listed[changed] >= self._listed_min)
        )
        return newer, described

    def _keep_latest(self, field: int, row: Rows, events: EventColumns, said: Rows, at: Rows) -> Rows:
        """Write the newest of the events `at` per item where it is newer than what is kept; which those were."""
        order = np.lexsort((said[at], events.event_key[at], events.time_us[at], row[at]))
        at = at[order]
        at = at[np.append(row[at][1:] != row[at][:-1], True)[: len(at)]]
        mine = row[at]
        rank = np.stack([events.time_us[at], events.event_key[at], said[at]])
        kept = np.stack([self._time_us[field, mine], self._event_key[field, mine], self.value[field, mine]])
        differs = rank != kept
        first = differs.argmax(axis=0)  # where the two first differ decides
        columns = np.arange(len(at))
        newer = differs.any(axis=0) & (rank[first, columns] > kept[first, columns])
        at, mine = at[newer], mine[newer]
        self._time_us[field, mine], self._event_key[field, mine] = events.time_us[at], events.event_key[at]
        self.value[field, mine] = said[at]
        return at
