"""The simulated catalogue: what there is, when, at what price and in what number.

What a shopper likes is a dot product of two latent vectors, and an item's vector is that of its brand plus that of the
adjective in its title plus noise: identifiers, categories, brands and words all carry part of the signal.

Shapes: M items, C categories, D latent dimensions. Items are sorted by category. Times in microseconds UTC.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.data import schema
from recsys.data.simulate.presets import DAY_US, LATENT_DIM, SALE_US, START_US, WARMUP_DAYS, Preset
from recsys.data.simulate.words import ADJECTIVES, BRANDS, DEPARTMENTS

NEVER_US = np.int64(1) << 60
PLENTY = np.int64(1) << 40  # stock of an item that can't sell out
_FLASH_SHARE, _NEW_SHARE, _DELISTED_SHARE, _SCARCE_SHARE, _REDUCED_SHARE = 0.03, 0.10, 0.02, 0.05, 0.7
_FLASH_BOOST = 8.0  # flash-sale items are what everyone came for
_CHINESE_SHARE = 0.3


@dataclass(slots=True, kw_only=True)
class Catalogue:
    """M items. stock and gone_us change as items sell out; the rest stays."""

    item_id: pl.Series  # str [M]
    title: pl.Series  # str [M]
    category_name: pl.Series  # str [M]
    brand_name: pl.Series  # str [M]
    category: npt.NDArray[np.int64]  # [M]
    first_of_category: npt.NDArray[np.int64]  # [C + 1], rows
    latent_MD: npt.NDArray[np.float32]
    popularity: npt.NDArray[np.float64]  # [M]
    price: npt.NDArray[np.int64]  # [M], minor units, before the sale
    sale_price: npt.NDArray[np.int64]  # [M], minor units, from SALE_US on
    listed_us: npt.NDArray[np.int64]  # [M]
    gone_us: npt.NDArray[np.int64]  # [M], delisted or sold out; NEVER_US
    stock: npt.NDArray[np.int64]  # [M], units left

    def available(self, time_us: int) -> npt.NDArray[np.bool_]:
        """Which items can be shown at a time. Shape [M]."""
        return (self.listed_us <= time_us) & (self.gone_us > time_us)

    def price_at(self, item: npt.NDArray[np.int64], time_us: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Price of each item at each time, minor units. Shape [N]."""
        return np.where(time_us >= SALE_US, self.sale_price[item], self.price[item])

    def items(self) -> pl.DataFrame:
        """items.parquet: the catalogue as first known."""
        return pl.DataFrame(
            {
                "item_id": self.item_id,
                "available_from": _times(self.listed_us),
                "title": self.title,
                "category": self.category_name,
                "brand": self.brand_name,
                "price": np.where(self.listed_us >= SALE_US, self.sale_price, self.price),
            }
        )

    def changes(self, initial_stock: npt.NDArray[np.int64], mark: str) -> pl.DataFrame:
        """catalog.parquet: listings, stock of scarce items, price drops at midnight, delistings, stock-outs."""
        everything = np.arange(len(self.item_id))
        scarce = np.flatnonzero(initial_stock < PLENTY)
        reduced = np.flatnonzero((self.sale_price < self.price) & (self.listed_us < SALE_US) & (self.gone_us > SALE_US))
        sold_out = np.flatnonzero(self.stock == 0)
        delisted = np.flatnonzero((self.gone_us < NEVER_US) & (self.stock > 0))
        first_price = np.where(self.listed_us >= SALE_US, self.sale_price, self.price)
        midnight = np.full(len(reduced), SALE_US)
        parts = [
            self._change("list", everything, self.listed_us, price=first_price),
            self._change("stock", scarce, self.listed_us[scarce], stock=initial_stock[scarce]),
            self._change("price", reduced, midnight, price=self.sale_price[reduced]),
            self._change("delist", delisted, self.gone_us[delisted]),
            self._change("stock", sold_out, self.gone_us[sold_out], stock=np.zeros(len(sold_out), np.int64)),
        ]
        frame = pl.concat(parts, how="diagonal").sort("event_time", maintain_order=True)
        return frame.with_columns(event_id=pl.format("{}-c{}", pl.lit(mark), pl.int_range(pl.len())))

    def _change(
        self, kind: str, rows: npt.NDArray[np.int64], time_us: npt.NDArray[np.int64], **values: npt.NDArray[np.int64]
    ) -> pl.DataFrame:
        columns = {"item_id": self.item_id.gather(rows), "event_time": _times(time_us), **values}
        return pl.DataFrame(columns).with_columns(kind=pl.lit(kind))


def make(preset: Preset, rng: np.random.Generator) -> Catalogue:
    """Draw a catalogue. The first item of each category is always there, so that no category is ever empty."""
    num, num_categories = preset.num_items, preset.num_categories
    size = rng.dirichlet(np.full(num_categories, 5.0))
    category = np.sort(
        np.concatenate([np.arange(num_categories), rng.choice(num_categories, num - num_categories, p=size)])
    )
    first = np.searchsorted(category, np.arange(num_categories + 1))
    rank_in_category = np.arange(num) - first[category]
    evergreen = rank_in_category == 0
    brand, adjective = rng.integers(len(BRANDS), size=num), rng.integers(len(ADJECTIVES), size=num)
    latent = (
        rng.normal(0, 0.5, (len(BRANDS), LATENT_DIM))[brand]
        + rng.normal(0, 0.35, (len(ADJECTIVES), LATENT_DIM))[adjective]
        + rng.normal(0, 0.2, (num, LATENT_DIM))
    )
    fate = np.where(evergreen, 1.0, rng.random(num))  # one draw decides, so that the shares add up
    flash = fate < _FLASH_SHARE
    new = ~flash & (fate < _FLASH_SHARE + _NEW_SHARE)
    delisted = ~flash & ~new & (fate < _FLASH_SHARE + _NEW_SHARE + _DELISTED_SHARE)
    scarce = flash | (~new & ~delisted & (fate < _FLASH_SHARE + _NEW_SHARE + _DELISTED_SHARE + _SCARCE_SHARE))
    listed = START_US - rng.integers(1, 366, num) * DAY_US
    listed = np.where(new, START_US + rng.integers(1, WARMUP_DAYS, num) * DAY_US, listed)
    listed = np.where(flash, SALE_US, listed)
    gone = np.where(delisted, START_US + rng.integers(7, WARMUP_DAYS, num) * DAY_US, NEVER_US)
    popularity = (1.0 + rng.permuted(np.arange(num)) % np.diff(first)[category]) ** -preset.zipf
    popularity = np.where(flash, _FLASH_BOOST * popularity, popularity)
    base_price = np.exp(rng.normal(8.3, 1.1, num_categories))[category] * np.exp(rng.normal(0, 0.4, num))
    price = np.maximum(100, (base_price // 100).astype(np.int64) * 100 - 1)
    cut = np.where(flash | (rng.random(num) < _REDUCED_SHARE), rng.uniform(0.3, 0.9, num), 1.0)
    units = np.maximum(3, preset.num_events // num // 12)  # about half of a flash item's demand
    return Catalogue(
        item_id=pl.Series([f"i{n:06d}" for n in range(num)]),
        title=_titles(rng, category, brand, adjective, flash),
        category_name=pl.Series([_kinds()[c][0] for c in category.tolist()]),
        brand_name=pl.Series([BRANDS[b][0] for b in brand.tolist()]),
        category=category,
        first_of_category=first,
        latent_MD=latent.astype(np.float32),
        popularity=popularity,
        price=price,
        sale_price=np.maximum(1, (price * cut).astype(np.int64)),
        listed_us=listed.astype(np.int64),
        gone_us=gone.astype(np.int64),
        stock=np.where(scarce, rng.integers(1, 2 * units, num), PLENTY).astype(np.int64),
    )


def _kinds() -> list[tuple[str, str, str]]:
    """(category name, English noun, Chinese noun), departments interleaved so that a few categories already differ."""
    rows = [(f"{d} > {en}", en, zh) for d, nouns in DEPARTMENTS.items() for en, zh in nouns]
    return [row for i in range(8) for row in rows[i::8]]


def _titles(
    rng: np.random.Generator,
    category: npt.NDArray[np.int64],
    brand: npt.NDArray[np.int64],
    adjective: npt.NDArray[np.int64],
    flash: npt.NDArray[np.bool_],
) -> pl.Series:
    kinds, chinese = _kinds(), rng.random(len(category)) < _CHINESE_SHARE
    model = rng.integers(10, 1000, len(category))
    columns = zip(category, brand, adjective, flash, chinese, model, strict=True)
    return pl.Series(
        [
            f"{'【秒杀】' if f else ''}{BRANDS[b][1]}{ADJECTIVES[a][1]}{kinds[c][2]} {m}款"
            if zh
            else f"{'Flash Sale: ' if f else ''}{BRANDS[b][0]} {ADJECTIVES[a][0]} {kinds[c][1]} No. {m}"
            for c, b, a, f, zh, m in columns
        ]
    )


def _times(time_us: npt.NDArray[np.int64]) -> pl.Series:
    return pl.Series(time_us).cast(schema.TIME)
