"""online-retail: UCI Online Retail, InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country.

Rows without a customer, cancellations (invoice C...) and rows with a non-positive quantity or price are set aside: a
cancellation is not tied to the purchase it undoes, and often its purchase lies before the log. Times have no zone and
are read as UTC. Prices are in pounds sterling, kept in pence.
Source: Chen, D. (2015). Online Retail. UCI Machine Learning Repository, https://doi.org/10.24432/C5BW33 (CC BY 4.0).
"""

from __future__ import annotations

import polars as pl

from recsys.data.importers import base

COLUMNS = (
    "InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country",
)  # fmt: skip


def _read(source: base.Source) -> base.Imported:
    path = source.find("*.csv", "*.csv.gz")
    rows = base.read_csv(path, source.scratch, required=COLUMNS)
    base.require(rows, path, ("InvoiceNo", "StockCode", "Quantity", "InvoiceDate", "UnitPrice"))
    date = pl.col("InvoiceDate")
    times = pl.coalesce(
        date.str.to_datetime(f, time_unit="us", time_zone="UTC", strict=False)
        for f in ("%Y-%m-%d %H:%M:%S", "%m/%d/%Y %H:%M")  # as exported by pandas; as in the original sheet
    )
    rows = base.parse(
        rows,
        path,
        {
            "Quantity": (pl.col("Quantity").cast(pl.Int32, strict=False), "a whole number"),
            "UnitPrice": (pl.col("UnitPrice").cast(pl.Float64, strict=False), "a number"),
            "InvoiceDate": (times, "a time like 2010-12-01 08:26:00 or 12/1/2010 8:26"),
        },
    )
    rules = {
        "no_customer": pl.col("CustomerID").is_null(),
        "cancellation": pl.col("InvoiceNo").str.starts_with("C"),
        "non_positive_quantity": pl.col("Quantity") <= 0,
        "non_positive_price": ~(pl.col("UnitPrice") > 0),
        "bad_id": base.bad_ids("CustomerID", "StockCode"),
        "bad_time": base.bad_time("InvoiceDate"),
    }
    rows, rejected = base.split(rows, path, rules)
    rows = rows.sort("InvoiceDate", maintain_order=True).select(
        base.event_ids(base.fingerprint(path)),
        user_id=pl.col("CustomerID").str.strip_suffix(".0"),  # pandas wrote the column as floats
        item_id=pl.col("StockCode"),
        event_type=pl.lit("purchase"),
        event_time=pl.col("InvoiceDate"),
        session_id=pl.col("InvoiceNo"),
        price=base.minor_units(pl.col("UnitPrice")),
        quantity=pl.col("Quantity"),
        title=pl.col("Description").str.strip_chars(),
        attributes=pl.struct(country=pl.col("Country")).struct.json_encode(),
    )
    return base.Imported(
        events=rows.drop("title", "attributes"),
        items=base.items_from_events(rows, first=("title", "price")),
        users=rows.group_by("user_id").agg(pl.col("attributes").first()),
        rejected=rejected,
    )


IMPORTER = base.Importer(format="online-retail", licence="CC BY 4.0", read=_read)
