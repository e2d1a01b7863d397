"""Item vectors of a trained tower for items that training never saw: category and brand place them.

Shape legend: N items, D dimension.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from recsys.core.ids import key
from recsys.core.items import ItemTable
from recsys.models.embeddings import UNKNOWN_ROW
from recsys.models.jagged import Jagged, keyed
from recsys.models.tower import TABLES, Tower

Keys = npt.NDArray[np.int64]


class ColdItems:
    """Vectors from an item's key, category and brand, as `Tower.item_vectors` makes those of the run."""

    def __init__(self, tower: Tower, items: ItemTable) -> None:
        """items: of the tower's run; they say which category and brand each table row stands for."""
        self._tower = tower
        place = tower.items.vocabulary.rows(items.item_key)
        self._row_by_key: dict[str, dict[int, int]] = {}
        for table in ("category", "brand"):
            rows = np.append(UNKNOWN_ROW, tower.items.rows[table])[place]
            named = dict(zip(items.column(table), rows.tolist(), strict=True))
            self._row_by_key[table] = {key(name): row for name, row in named.items() if name}

    @property
    def dim(self) -> int:
        """Dimension D."""
        return self._tower.dim

    @torch.inference_mode()
    def encode(
        self, item_key: Keys, category_key: Keys, brand_key: Keys
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Vectors [N, D], and True [N] where anything is known that places the item.

        category_key, brand_key: `recsys.core.ids.key` of the names; of no or an unknown name, anything else.
        """
        place = self._tower.items.vocabulary.rows(item_key)
        rows = {
            "item": np.append(UNKNOWN_ROW, self._tower.items.rows["item"])[place],
            "category": self._rows("category", category_key),
            "brand": self._rows("brand", brand_key),
        }
        placed: npt.NDArray[np.bool_] = np.any([rows[t] != UNKNOWN_ROW for t in TABLES], axis=0)
        ids = keyed({t: Jagged(rows[t], np.array([len(item_key)], np.int32)) for t in TABLES})
        vectors: npt.NDArray[np.float32] = self._tower.net.items(self._tower.net.embed(ids)).numpy()
        return vectors, placed

    def _rows(self, table: str, name_key: Keys) -> Keys:
        held = self._row_by_key[table]
        return np.array([held.get(k, UNKNOWN_ROW) for k in name_key.tolist()], np.int64)
