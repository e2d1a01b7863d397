"""What ranking wants to know about items by key: id, names, category, brand, price; and which ones a request admits.

Of the run's items and of those that the catalogue stream has listed since. Shape legend: N items, M items of the run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core import key
from recsys.core.attributes import Where
from recsys.core.items import ItemTable
from recsys.ranking.live import LiveCatalogue
from recsys.ranking.titles import Titles

UNKNOWN = -1
Keys = npt.NDArray[np.int64]


class Catalogue:
    """Look-ups over an ItemTable without Python objects per item, and over what a LiveCatalogue adds to it."""

    def __init__(self, items: ItemTable, live: LiveCatalogue | None = None, titles: Titles | None = None) -> None:
        """items: the run's items.parquet. live: over the same items; None = nothing is told after the run. titles: how
        alike those of the run's items are; None = nobody knows.
        """
        self.titles = titles
        self.items, self.live = items, LiveCatalogue(items) if live is None else live
        self._category, self._category_code = _codes(items.table.column("category"))
        self._brand, self._brand_code = _codes(items.table.column("brand"))
        price = items.table.column("price").cast(pa.float32(), safe=False)  # above 2**24 rounded, not refused
        self._price = np.append(price.fill_null(float("nan")).to_numpy(), np.float32("nan")).astype(np.float32)
        since_us = items.table.column("available_from").fill_null(0).to_numpy()
        self._newest_first = np.argsort(-since_us, kind="stable")

    def category(self, item_key: Keys) -> npt.NDArray[np.int32]:
        """Category code [N], UNKNOWN where the item is unknown or has none."""
        return self._coded(item_key, self._category, self._category_code, "category")

    def brand(self, item_key: Keys) -> npt.NDArray[np.int32]:
        """Brand code [N], UNKNOWN where the item is unknown or has none."""
        return self._coded(item_key, self._brand, self._brand_code, "brand")

    def price(self, item_key: Keys) -> npt.NDArray[np.float32]:
        """List price in minor units as first known [N], NaN where unknown; of an arrival the price as last told."""
        row = self.items.rows(item_key)
        price = self._price[row]
        if len(self.live.arrivals) and len(new := np.flatnonzero(row < 0)):
            told = self.live.price(item_key[new])
            price[new] = np.where(told >= 0, told, np.float32("nan"))
        return price

    def known(self, item_key: Keys) -> npt.NDArray[np.bool_]:
        """True [N] where the run has the item, or the catalogue stream has listed it."""
        return self.live.listed(item_key)

    def ids(self, item_key: Keys) -> list[str | None]:
        """Item ids of the keys, None for unknown keys."""
        return self.values("item_id", item_key)

    def values(self, name: str, item_key: Keys) -> list[str | None]:
        """item_id, title, category or brand of the keys [N], None where unknown; of an arrival as last told."""
        found: list[str | None] = self.items.values(name, item_key)
        if len(self.live.arrivals):
            table = self.live.arrivals.table()
            missing = np.flatnonzero(self.items.rows(item_key) < 0)
            for place, row in zip(missing.tolist(), table.rows(item_key[missing]).tolist(), strict=True):
                found[place] = getattr(table.names[row], name) if row >= 0 else None
        return found

    def admits(self, where: Where, item_key: Keys) -> npt.NDArray[np.bool_]:
        """True [N] for items that a request asks for."""
        if not where.restricts:
            return np.ones(len(item_key), np.bool_)
        return where.admits(item_key, self.live.attributes(item_key))

    def matching(self, where: Where) -> Keys:
        """Every item that a request asks for: the newest first, ties by key; an allow-list in its own order."""
        if where.allow is not None:
            return where.allow[self.admits(where, where.allow)]
        new = self.live.new_items()
        passed = where.matches(self.live.run_attributes())[self._newest_first]
        return np.concatenate([new[self.admits(where, new)], self.items.item_key[self._newest_first[passed]]])

    def _coded(
        self, item_key: Keys, of_row: npt.NDArray[np.int32], codes: dict[int, int], name: str
    ) -> npt.NDArray[np.int32]:
        row = self.items.rows(item_key)
        found = of_row[row]
        if len(self.live.arrivals) and len(new := np.flatnonzero(row < 0)):
            told = getattr(self.live.attributes(item_key[new]), f"{name}_key").tolist()
            found[new] = [codes.setdefault(k, len(codes)) if k else UNKNOWN for k in told]
        return found


def _codes(column: Any) -> tuple[npt.NDArray[np.int32], dict[int, int]]:
    """Dictionary codes of a string column, UNKNOWN at the end for row -1; and the code of each name's key."""
    encoded = pc.dictionary_encode(column.combine_chunks())
    code = np.append(encoded.indices.fill_null(UNKNOWN).to_numpy(zero_copy_only=False), UNKNOWN).astype(np.int32)
    return code, {key(name): place for place, name in enumerate(encoded.dictionary.to_pylist())}
