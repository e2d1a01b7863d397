"""Item vectors of a trained tower for items that training never saw: category, brand and title place them.

Shape legend: N items, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from recsys.core.ids import key
from recsys.core.items import ItemTable
from recsys.models.embeddings import UNKNOWN_ROW
from recsys.models.text.base import TextEncoder, encode_some, title_text
from recsys.models.tower import TABLES, Tower, item_input, price_bucket

Keys = npt.NDArray[np.int64]


class ColdItems:
    """Vectors from what is known of an item, as `Tower.item_vectors` makes those of the run."""

    def __init__(self, tower: Tower, items: ItemTable, text_encoder: TextEncoder | None = None) -> None:
        """items: of the tower's run; they say which category and brand each table row stands for.

        text_encoder: the one the tower was trained with; None = titles of new items say nothing.
        """
        self._tower, self._text_encoder = tower, text_encoder
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

    @property
    def reads_titles(self) -> bool:
        """Whether a title can place an item."""
        return self._text_encoder is not None

    @torch.inference_mode()
    def encode(
        self,
        item_key: Keys,
        category_key: Keys,
        brand_key: Keys,
        price_minor: Keys | None = None,
        title: Sequence[str | None] | None = None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Vectors [N, D], and True [N] where anything is known that places the item: id, category, brand or title.

        category_key, brand_key: `recsys.core.ids.key` of the names; of no or an unknown name, anything else.
        price_minor: negative where unknown. Price and title of an item of the run are those that the run has.
        """
        place = self._tower.items.vocabulary.rows(item_key)
        rows = {
            "item": np.append(UNKNOWN_ROW, self._tower.items.rows["item"])[place],
            "category": self._rows("category", category_key),
            "brand": self._rows("brand", brand_key),
        }
        text, price = self._text(place, title), self._price(place, price_minor)
        of_text = None if text is None else (text, np.arange(len(text)))
        given = item_input(rows, np.array([len(item_key)]), of_text, price)
        vectors: npt.NDArray[np.float32] = self._tower.net.items(self._tower.net.embed(given)).numpy()
        known = [rows[t] != UNKNOWN_ROW for t in TABLES] + ([] if text is None else [text.any(axis=1)])
        return vectors, np.any(known, axis=0)

    def _text(self, place: Keys, title: Sequence[str | None] | None) -> npt.NDArray[np.float32] | None:
        """Text vectors [N, T] where the tower reads any."""
        held = self._tower.items.text_at(place)
        if held is None:
            return None
        text = held.astype(np.float32)
        new = np.flatnonzero(place == UNKNOWN_ROW)
        if self._text_encoder is not None and title is not None and len(new):
            text[new] = encode_some(self._text_encoder, [title_text(title[i]) for i in new.tolist()])
        return text

    def _price(self, place: Keys, price_minor: Keys | None) -> Keys | None:
        """Price buckets [N] where the tower reads any."""
        held = self._tower.items.price_at(place)
        if held is None or price_minor is None:
            return held
        return np.where(place == UNKNOWN_ROW, price_bucket(price_minor), held)

    def _rows(self, table: str, name_key: Keys) -> Keys:
        held = self._row_by_key[table]
        return np.array([held.get(k, UNKNOWN_ROW) for k in name_key.tolist()], np.int64)
