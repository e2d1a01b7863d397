"""What the catalogue stream says now: price, stock, names, whether an item is listed; of new items too.

Kept beside the feature store, so that what is sold out stays out of slates also where the store is late or away.
Shape legend: N events or candidates, M items of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.columns import EventColumns
from recsys.core import EventBatch, EventKind, keys
from recsys.core.attributes import Attributes
from recsys.core.items import ItemTable
from recsys.ranking.arrivals import Arrivals
from recsys.ranking.told import LISTED, PRICE, STOCK, UNSAID, Told

Keys = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
NEW_ITEMS_MAX = 100_000
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of N catalogue events: changed something, said nothing newer, named an item that there is no
    room for.
    """

    applied: int = 0
    superseded: int = 0
    unknown: int = 0


class LiveCatalogue:
    """Latest value per item and field, whatever the order of arrival. 96 bytes an item of the run.

    One thread applies while others ask: each item changes from its old state to its new one at once.
    """

    def __init__(self, items: ItemTable, new_items_max: int = NEW_ITEMS_MAX) -> None:
        """items: the run's; all count as available until the stream says otherwise. new_items_max: others, at most."""
        self._items = items
        self._run = Told(len(items) + 1, available=True)  # the last row is for items unknown to the run: row -1
        self._run.category_key[:-1] = _name_keys(items.table.column("category"))
        self._run.brand_key[:-1] = _name_keys(items.table.column("brand"))
        self._list_price = np.append(items.table.column("price").fill_null(UNSAID).to_numpy(), UNSAID)
        self.arrivals = Arrivals(new_items_max)
        self.trusted = False  # whether all that is known on the log is known here; set by whoever feeds it

    def apply(self, batch: EventBatch) -> Applied:
        """`take`, without its keys."""
        return self.take(batch)[0]

    def take(self, batch: EventBatch) -> tuple[Applied, Keys]:
        """Take N events of `catalog`; the greatest (event_time, event_id) wins per field, as in `feature_store.views`.

        A repeat changes nothing. Events that are no price, stock or item change are superseded by definition. Also
        gives the keys of what has changed, each once.
        """
        events = EventColumns.of(batch)
        row = self._items.rows(events.item_key)
        told = np.isin(events.kind, (EventKind.PRICE, EventKind.STOCK, EventKind.ITEM))
        newer, unknown = self._run.take(events, row, told & (row >= 0))[0], 0
        others = np.flatnonzero(told & (row < 0))
        if len(others):
            news, unknown = self.arrivals.take(batch, events, others)
            newer |= news
        applied = int(np.count_nonzero(newer))
        return Applied(applied, len(row) - applied - unknown, unknown), np.unique(events.item_key[newer])

    def capture(self) -> dict[str, npt.NDArray[Any]]:
        """All that was told, for a snapshot. By the thread that applies, or while it does not."""
        parts = {"run": self._run.capture(), "new": self.arrivals.capture()}
        return {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """As `capture` gave it, over the same items; before anything is told."""
        for part, told in (("run", self._run), ("new", self.arrivals)):
            told.restore({n.removeprefix(f"{part}."): a for n, a in arrays.items() if n.startswith(f"{part}.")})

    def available(self, item_key: Keys) -> Mask:
        """True [N] unless the stream says sold out or delisted, or has named the item without listing it."""
        return np.asarray(self._of_each(item_key, lambda told: told.available), np.bool_)

    def listed(self, item_key: Keys) -> Mask:
        """True [N] for items of the run, and for others that the stream has listed: those have a name."""
        known = self._items.rows(item_key) >= 0
        return np.asarray(known | (self._said(LISTED, item_key) == 1))

    def listing(self, item_key: Keys) -> npt.NDArray[np.int64]:
        """What the stream says [N]: 1 listed, 0 delisted, -1 nothing."""
        return self._said(LISTED, item_key)

    def says_stock(self, item_key: Keys) -> Mask:
        """True [N] where the stream has named a stock."""
        return np.asarray(self._said(STOCK, item_key) != UNSAID)

    def says_listed(self, item_key: Keys) -> Mask:
        """True [N] where the stream has said listed or delisted."""
        return np.asarray(self._said(LISTED, item_key) != UNSAID)

    def price(self, item_key: Keys) -> npt.NDArray[np.int64]:
        """Price in minor units [N], -1 where the stream has named none."""
        return self._said(PRICE, item_key)

    def category_key(self, item_key: Keys) -> Keys:
        """Key of the category's name [N], 0 where there is none."""
        return self._of_each(item_key, lambda told: told.category_key)

    def titles(self, item_key: Keys) -> list[str | None]:
        """What the stream calls items [N] that the run does not know; None for others."""
        table = self.arrivals.table()
        rows = np.where(self._items.rows(item_key) < 0, table.rows(item_key), -1)
        return [table.names[row].title if row >= 0 else None for row in rows.tolist()]

    def attributes(self, item_key: Keys) -> Attributes:
        """What is known of items [N] now: the stream's word, else the run's."""
        said, listed_at = self.price(item_key), self._list_price[self._items.rows(item_key)]
        return Attributes(
            category_key=self.category_key(item_key),
            brand_key=self._of_each(item_key, lambda told: told.brand_key),
            price_minor=np.where(said == UNSAID, listed_at, said),
            stock_units=self._said(STOCK, item_key),
        )

    def run_attributes(self) -> Attributes:
        """The same of every item of the run, in its order."""
        said = self._run.value[:, :-1]
        return Attributes(
            category_key=self._run.category_key[:-1],
            brand_key=self._run.brand_key[:-1],
            price_minor=np.where(said[PRICE] == UNSAID, self._list_price[:-1], said[PRICE]),
            stock_units=said[STOCK],
        )

    def new_items(self, limit: int | None = None) -> Keys:
        """Keys of items that may be sold and that the run does not know, the newest listed first; `limit` at most [A].

        Asked by every request: costs what is asked for, however many there are.
        """
        table = self.arrivals.table()
        newest: Keys = table.item_key[table.newest[:limit]]
        return newest

    def num_unavailable(self) -> int:
        """Items that are kept out, among those that were ever there."""
        table = self.arrivals.table()
        told = table.told.value[:, : len(table.names)]
        gone = (told[LISTED] == 0) | ((told[STOCK] == 0) & (told[LISTED] != UNSAID))
        return int(np.count_nonzero(~self._run.available) + np.count_nonzero(gone))

    def _said(self, field: int, item_key: Keys) -> npt.NDArray[np.int64]:
        return self._of_each(item_key, lambda told: told.value[field])

    def _of_each(self, item_key: Keys, column: Callable[[Told], npt.NDArray[T]]) -> npt.NDArray[T]:
        """One column's value of each key [N]: of the run, else of an arrival, else of nothing."""
        row = self._items.rows(item_key)
        found = column(self._run)[row]
        unknown = np.flatnonzero(row < 0)
        if len(unknown) and len(self.arrivals):
            table = self.arrivals.table()
            at = table.rows(item_key[unknown])
            found[unknown[at >= 0]] = column(table.told)[at[at >= 0]]
        return found


def _name_keys(column: pa.ChunkedArray) -> Keys:
    """Key of each name, 0 where there is none; a key is made once per name."""
    coded = pc.dictionary_encode(column.combine_chunks())
    code = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    named: Keys = np.append(keys(coded.dictionary.to_pylist()), 0)[code]
    return named
