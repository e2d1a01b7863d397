"""What is known of an item that requests may ask for, and Where: which items a slate may hold.

Shape legend: N items of a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.core.ids import key
from recsys.core.items import ItemTable

Mask = npt.NDArray[np.bool_]
UNKNOWN = -1  # price or stock that nobody has told
Names = list[str | None]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Attributes:
    """What `Where` looks at, int64 [N] each: keys of category and brand (0 = none), price in minor units, stock."""

    category_key: npt.NDArray[np.int64]
    brand_key: npt.NDArray[np.int64]
    price_minor: npt.NDArray[np.int64]
    stock_units: npt.NDArray[np.int64]

    @classmethod
    def unknown(cls, n: int) -> Attributes:
        """Nothing known about N items."""
        nameless = np.zeros(n, np.int64)
        return cls(category_key=nameless, brand_key=nameless.copy(), price_minor=_unknown(n), stock_units=_unknown(n))

    @classmethod
    def of(
        cls,
        n: int,
        *,
        category: Names | None = None,
        brand: Names | None = None,
        price_minor: npt.NDArray[np.int64] | None = None,
        stock_units: npt.NDArray[np.int64] | None = None,
    ) -> Attributes:
        """Of N items, from names and numbers; what is left out is unknown."""
        return cls(
            category_key=name_keys(category or [None] * n),
            brand_key=name_keys(brand or [None] * n),
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


COLUMNS = ("category_key", "brand_key", "price_minor", "stock_units")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Where:
    """Which items may come back; what is None or empty does not matter.

    categories, brands: names, any of them; an item of unknown category is in none. deny_categories, deny_brands: names,
    none of them. price_min_minor, price_max_minor: both ends belong to it; an item of unknown price is in no range.
    allow: item keys. sold_out: items known to be sold out may come back too.
    """

    categories: frozenset[str] | None = None
    brands: frozenset[str] | None = None
    deny_categories: frozenset[str] = frozenset()
    deny_brands: frozenset[str] = frozenset()
    price_min_minor: int | None = None
    price_max_minor: int | None = None
    allow: npt.NDArray[np.int64] | None = None
    sold_out: bool = False

    @property
    def predicate(self) -> tuple[object, ...] | None:
        """The part that is about attributes, as something to look up by; None when every item passes."""
        wanted = (self.categories, self.brands, self.price_min_minor, self.price_max_minor)
        denied = (self.deny_categories, self.deny_brands)
        return None if wanted == (None,) * 4 and not any(denied) else (*wanted, *denied)

    @property
    def restricts(self) -> bool:
        """Whether anything is asked for."""
        return self.allow is not None or self.predicate is not None

    def matches(self, items: Attributes) -> Mask:
        """True [N] where the predicate holds; stock and allow-list are not part of it."""
        passed = np.ones(len(items), np.bool_)
        for column, wanted, denied in (
            (items.category_key, self.categories, self.deny_categories),
            (items.brand_key, self.brands, self.deny_brands),
        ):
            if wanted is not None:
                passed &= np.isin(column, [key(name) for name in wanted])
            if denied:
                passed &= ~np.isin(column, [key(name) for name in denied])
        if self.price_min_minor is not None:
            passed &= items.price_minor >= max(self.price_min_minor, 0)
        if self.price_max_minor is not None:
            passed &= (items.price_minor <= self.price_max_minor) & (items.price_minor >= 0)
        return passed

    def admits(self, item_key: npt.NDArray[np.int64], items: Attributes) -> Mask:
        """True [N] for what may come back, as far as stock does not decide."""
        passed = self.matches(items)
        return passed if self.allow is None else passed & np.isin(item_key, self.allow)


EVERYTHING = Where()


def attributes_of(items: ItemTable, item_key: npt.NDArray[np.int64]) -> Attributes:
    """What a run's items.parquet says of items, in the order of `item_key`."""
    price = np.array([UNKNOWN if p is None else p for p in items.values("price", item_key)], np.int64)
    category, brand = (items.values(name, item_key) for name in ("category", "brand"))
    return Attributes.of(len(item_key), category=category, brand=brand, price_minor=price)


def _unknown(n: int) -> npt.NDArray[np.int64]:
    return np.full(n, UNKNOWN, np.int64)


def name_keys(names: Names) -> npt.NDArray[np.int64]:
    """Key of each name [N], 0 where there is none."""
    by_name = {name: key(name) for name in set(names) if name}
    return np.array([by_name.get(name or "", 0) for name in names], np.int64)
