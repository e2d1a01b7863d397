"""amazon-reviews: reviews as JSON lines (.gz or not) in the fields of 2018 or of 2023, and their metadata.

A review says that the item was bought: it is a `purchase`. The metadata file is meta_NAME beside NAME (without the _5
of the 5-core files), or --option metadata=PATH. The same user, item and time twice is one review; the repeat is set
aside. Titles, brands and categories carry no time: they are taken as first known.
Source: Ni, Li and McAuley, EMNLP 2019 (2018); Hou et al., arXiv 2403.03952 (2023).
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recsys.core.errors import BadInput, NotFound
from recsys.data.importers import base

_FIELDS_2018 = {"user": "reviewerID", "item": "asin", "time": "unixReviewTime"}
_FIELDS_2023 = {"user": "user_id", "item": "parent_asin", "time": "timestamp"}
_META_FIELDS = ("asin", "parent_asin", "title", "brand", "store", "category", "categories", "main_category", "price")
_SIGN = r"(?:[A-Z]{0,3}\p{Sc}|[A-Z]{3})?"  # $, US$, USD
_AMOUNT = r"(?:\d{1,3}(?:,\d{3}){1,3}|\d{1,12})(?:\.\d+)?|\.\d+"
_MONEY = rf"{_SIGN}\s*({_AMOUNT})\s*{_SIGN}"
_RANGE = rf"(?:\s*(?:[-–]|to)\s*{_MONEY})?"
_PER_UNIT = rf"(?:\s*\(\s*{_MONEY}\s*/[^()]{{1,40}}\))?"  # ($1.08 / Ounce)
_PRICE = rf"^\s*(?:from\s+)?{_MONEY}{_RANGE}{_PER_UNIT}\s*$"  # all of it: some texts are a page's style sheet


def _read(source: base.Source) -> base.Imported:
    path = _reviews(source.path)
    columns = sorted({*_FIELDS_2018.values(), *_FIELDS_2023.values()})
    rows = base.read_json_lines(path, source.scratch, columns=columns)
    is_2018 = rows["reviewerID"].null_count() < len(rows)
    fields, unit = (_FIELDS_2018, "s") if is_2018 else (_FIELDS_2023, "ms")
    base.require(rows, path, tuple(fields.values()))
    rows = rows.select(base.LINE, *fields.values())
    rows = base.parse(rows, path, {fields["time"]: base.epoch(fields["time"], unit)})
    rules = {
        "repeated_review": ~pl.struct(fields.values()).is_first_distinct(),
        "bad_id": base.bad_ids(fields["user"], fields["item"]),
        "bad_time": base.bad_time(fields["time"]),
    }
    rows, rejected = base.split(rows, path, rules)
    events = rows.select(
        base.event_ids(base.fingerprint(path)),
        user_id=pl.col(fields["user"]),
        item_id=pl.col(fields["item"]),
        event_type=pl.lit("purchase"),
        event_time=pl.col(fields["time"]),
    ).sort("event_time", maintain_order=True)
    items = base.items_from_events(events)
    metadata = _metadata(path, source.options.get("metadata"))
    if metadata is not None:
        described = _described(metadata, source.scratch).unique("item_id", keep="first", maintain_order=True)
        items = items.join(described, on="item_id", how="left", maintain_order="left")
    return base.Imported(events=events, items=items, rejected=rejected)


def _reviews(path: Path) -> Path:
    """The reviews file: the path, or the only JSON lines file of the folder that is not metadata."""
    if path.is_file():
        return path
    patterns = ("*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz")
    found = sorted({p for pattern in patterns for p in path.glob(pattern) if not p.name.startswith("meta_")})
    if len(found) != 1:
        came = ", ".join(p.name for p in found) or "none"
        raise BadInput(f"source {path}", came=came, expected="one reviews file", fix="Name the file itself.")
    return found[0]


def _metadata(reviews: Path, named: str | None) -> Path | None:
    if named is not None:
        if not Path(named).is_file():
            raise NotFound("--option metadata", came=named, expected="a file", fix="Correct the path.")
        return Path(named)
    stem, dot, ending = reviews.name.partition(".")
    beside = reviews.with_name(f"meta_{stem.removesuffix('_5')}{dot}{ending}")
    return beside if beside.is_file() else None


def _described(path: Path, scratch: Path) -> pl.DataFrame:
    """item_id, title, category ("A > B > C"), brand, price (minor units; of a range the lower; null for no price)."""
    rows = base.read_json_lines(path, scratch, columns=_META_FIELDS)
    rows = rows.with_columns(item_id=pl.coalesce("parent_asin", "asin"))
    base.require(rows, path, ("item_id",))
    tags = pl.coalesce(_path("categories"), _path("category"), "main_category")
    amount = pl.col("price").str.extract(_PRICE).str.replace_all(",", "").cast(pl.Float64)
    return rows.select(
        "item_id",
        title=_text("title"),
        category=tags,
        brand=pl.coalesce(_text("brand"), _text("store")),
        price=base.minor_units(amount),
    )


def _text(column: str) -> pl.Expr:
    return pl.when(pl.col(column).str.strip_chars() != "").then(pl.col(column).str.strip_chars())


def _path(column: str) -> pl.Expr:
    """A JSON list of names as "A > B"; null for what is no list or empty."""
    is_list = pl.when(pl.col(column).str.starts_with("[")).then(pl.col(column))
    names = is_list.str.json_decode(pl.List(pl.String))
    return pl.when(names.list.len() > 0).then(names.list.join(" > ", ignore_nulls=True))


IMPORTER = base.Importer(
    format="amazon-reviews",
    licence="research use; see the dataset's page",
    read=_read,
    options={"metadata": "path of the metadata file, where it is not meta_NAME beside the reviews"},
)
