"""What an index of item vectors promises, which items a search may return, and what is known of each item.

Shape legend: M items, N items of a call, B queries, D dimension, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from recsys.core.ids import key

Keys = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
UNKNOWN = -1  # price or stock that nobody has told


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Attributes:
    """What filters look at, int64 [N] each: key of the category (0 = none), price in minor units, units in stock."""

    category_key: npt.NDArray[np.int64]
    price_minor: npt.NDArray[np.int64]
    stock_units: npt.NDArray[np.int64]

    @classmethod
    def unknown(cls, n: int) -> Attributes:
        """Nothing known about N items."""
        return cls(category_key=np.zeros(n, np.int64), price_minor=_unknown(n), stock_units=_unknown(n))

    @classmethod
    def of(
        cls,
        n: int,
        *,
        category: list[str | None] | None = None,
        price_minor: npt.NDArray[np.int64] | None = None,
        stock_units: npt.NDArray[np.int64] | None = None,
    ) -> Attributes:
        """Of N items, from category names and numbers; what is left out is unknown."""
        named = category if category is not None else [None] * n
        by_name = {name: key(name) for name in set(named) if name}
        return cls(
            category_key=np.array([by_name.get(name or "", 0) for name in named], np.int64),
            price_minor=_unknown(n) if price_minor is None else np.array(price_minor, np.int64),
            stock_units=_unknown(n) if stock_units is None else np.array(stock_units, np.int64),
        )

    @classmethod
    def concat(cls, first: Attributes, second: Attributes) -> Attributes:
        """One after the other."""
        return cls(**{c: np.concatenate([getattr(first, c), getattr(second, c)]) for c in COLUMNS})

    def __len__(self) -> int:
        return len(self.category_key)

    def take(self, rows: npt.NDArray[np.int64] | slice) -> Attributes:
        """Copies of some rows."""
        return Attributes(**{c: np.array(getattr(self, c)[rows]) for c in COLUMNS})

    def view(self, count: int) -> Attributes:
        """The first rows, without a copy."""
        return Attributes(**{c: getattr(self, c)[:count] for c in COLUMNS})

    def put(self, rows: npt.NDArray[np.int64] | slice, values: Attributes) -> None:
        """Overwrite some rows in place."""
        for column in COLUMNS:
            getattr(self, column)[rows] = getattr(values, column)

    def on_sale(self) -> Mask:
        """True [N] unless the item is known to be sold out."""
        known: Mask = self.stock_units != 0
        return known


COLUMNS = ("category_key", "price_minor", "stock_units")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Where:
    """Which items may come back; what is None does not matter. An item of unknown price is in no price range.

    categories: names, any of them. price_min_minor, price_max_minor: both ends belong to it. allow: item keys.
    sold_out: items known to be sold out may come back too.
    """

    categories: frozenset[str] | None = None
    price_min_minor: int | None = None
    price_max_minor: int | None = None
    allow: npt.NDArray[np.int64] | None = None
    sold_out: bool = False

    @property
    def predicate(self) -> tuple[frozenset[str] | None, int | None, int | None] | None:
        """The part that is about attributes, as something to look up by; None when every item passes."""
        parts = (self.categories, self.price_min_minor, self.price_max_minor)
        return None if parts == (None, None, None) else parts

    def matches(self, items: Attributes) -> Mask:
        """True [N] where the predicate holds; stock and allow-list are not part of it."""
        passed = np.ones(len(items), np.bool_)
        if self.categories is not None:
            passed &= np.isin(items.category_key, [key(name) for name in self.categories])
        if self.price_min_minor is not None:
            passed &= items.price_minor >= max(self.price_min_minor, 0)
        if self.price_max_minor is not None:
            passed &= (items.price_minor <= self.price_max_minor) & (items.price_minor >= 0)
        return passed


EVERYTHING = Where()


class VectorIndex(Protocol):
    """Item vectors under their keys, searched by inner product."""

    @property
    def dim(self) -> int:
        """Dimension D."""
        ...

    def __len__(self) -> int:
        """Items that are there, sold-out ones among them."""
        ...

    def search(self, vectors: Vectors, k: int, where: Where = EVERYTHING) -> tuple[Keys, Vectors]:
        """Keys [B, K] and inner products [B, K] of the nearest items that `where` admits, best first.

        K = k. Fewer than k items come back only where fewer exist; the rest of a row is key -1, score -inf.
        Raises: VersionMismatch for vectors of another dimension; BadInput for what is not finite.
        """
        ...


def _unknown(n: int) -> npt.NDArray[np.int64]:
    return np.full(n, UNKNOWN, np.int64)
