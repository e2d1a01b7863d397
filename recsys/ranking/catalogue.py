"""What ranking wants to know about a run's items by key: id, category, brand, list price. Shape legend: N items."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.items import ItemTable

UNKNOWN = -1


class Catalogue:
    """Look-ups over an ItemTable without Python objects per item. Made once per run."""

    def __init__(self, items: ItemTable) -> None:
        """items: the run's items.parquet."""
        self.items = items
        self._category = _codes(items.table.column("category"))
        self._brand = _codes(items.table.column("brand"))
        price = items.table.column("price").cast(pa.float32())
        self._price = np.append(price.fill_null(float("nan")).to_numpy(), np.float32("nan")).astype(np.float32)

    def category(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Category code [N], UNKNOWN where the item is unknown or has none."""
        return self._category[self.items.rows(item_key)]

    def brand(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Brand code [N], UNKNOWN where the item is unknown or has none."""
        return self._brand[self.items.rows(item_key)]

    def price(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """List price in minor units as first known [N], NaN where unknown."""
        return self._price[self.items.rows(item_key)]

    def known(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """True [N] where the run has the item."""
        return self.items.rows(item_key) >= 0


def _codes(column: Any) -> npt.NDArray[np.int32]:
    """Dictionary codes of a string column, one more at the end so that row -1 reads UNKNOWN."""
    encoded = pc.dictionary_encode(column.combine_chunks()).indices
    return np.append(encoded.fill_null(UNKNOWN).to_numpy(zero_copy_only=False), UNKNOWN).astype(np.int32)
