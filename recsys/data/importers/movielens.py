"""movielens: the three layouts of GroupLens: ml-100k (u.data, u.item), ml-1m (ratings.dat, movies.dat), ml-latest
(ratings.csv, movies.csv).

A rating says that the film was watched: it is a `purchase`. With --option rating_min=4 ratings below it are a `view`.
Titles keep their year, categories are the genres joined by |. A film is available from its first rating.
Source: Harper and Konstan, ACM TiiS 5(4), 2015, https://grouplens.org/datasets/movielens/.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recsys.core.errors import BadInput, NotFound
from recsys.data.importers import base

RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_LAYOUTS = (  # ratings, separator, movies
    ("u.data", "\t", "u.item"),
    ("ratings.dat", "::", "movies.dat"),
    ("ratings.csv", ",", "movies.csv"),
)
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def _read(source: base.Source) -> base.Imported:
    folder = source.path if source.path.is_dir() else source.path.parent
    layout = next((names for names in _LAYOUTS if (folder / names[0]).is_file()), None)
    if layout is None:
        expected = " or ".join(ratings for ratings, _, _ in _LAYOUTS)
        raise NotFound(str(folder), came="none of the layouts", expected=expected, fix="Name the unpacked folder.")
    path, separator, movies = folder / layout[0], layout[1], folder / layout[2]
    rows = _ratings(path, separator, source.scratch)
    base.require(rows, path, RATING_COLUMNS)
    rating = (pl.col("rating").cast(pl.Float64, strict=False), "a number")
    rows = base.parse(rows, path, {"rating": rating, "timestamp": base.epoch("timestamp", "s")})
    rows, rejected = base.split(rows, path, {"bad_id": base.bad_ids(), "bad_time": base.bad_time("timestamp")})
    watched = pl.col("rating") >= _rating_min(source.options.get("rating_min", "0"))
    events = rows.select(
        base.event_ids(base.fingerprint(path)),
        "user_id",
        "item_id",
        event_type=pl.when(watched).then(pl.lit("purchase")).otherwise(pl.lit("view")),
        event_time=pl.col("timestamp"),
    ).sort("event_time", maintain_order=True)
    items = base.items_from_events(events)
    if movies.is_file():
        described = _movies(movies, separator, source.scratch).unique("item_id", keep="first", maintain_order=True)
        items = items.join(described, on="item_id", how="left", maintain_order="left")
    info = {"options": dict(source.options)} if source.options else {}
    return base.Imported(events=events, items=items, rejected=rejected, info=info)


def _rating_min(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BadInput("--option rating_min", came=text, expected="a number", fix="Write e.g. 4.") from error


def _separated(path: Path, separator: str, columns: tuple[str, ...]) -> pl.DataFrame:
    """A file without header, quotes or UTF-8 (GroupLens wrote Latin-1), split at a separator of any length."""
    if path.stat().st_size == 0:
        raise BadInput(str(path), came="an empty file", expected="rows", fix="Download it again.")
    lines = path.read_bytes().decode("latin-1").replace("\r", "").removesuffix("\n").split("\n")
    cells = pl.Series(lines).str.split(separator)
    wrong = cells.list.len() < len(columns)
    if wrong.any():
        at = int(wrong.arg_max() or 0)
        raise BadInput(
            f"{path}, line {at + 1}",
            came=repr(lines[at][:80]),
            expected=f"{len(columns)} values ({', '.join(columns[:4])}, ...) separated by {separator!r}",
            fix="Download it again.",
        )
    frame = pl.DataFrame({name: cells.list.get(i) for i, name in enumerate(columns)})
    frame = frame.with_columns(pl.when(pl.all() != "").then(pl.all()))
    return frame.with_row_index(base.LINE, offset=1).with_columns(pl.col(base.LINE).cast(pl.Int64))


def _ratings(path: Path, separator: str, scratch: Path) -> pl.DataFrame:
    if separator != ",":
        return _separated(path, separator, RATING_COLUMNS)
    rows = base.read_csv(path, scratch, required=("userId", "movieId", "rating", "timestamp"))
    return rows.rename({"userId": "user_id", "movieId": "item_id"})


def _movies(path: Path, separator: str, scratch: Path) -> pl.DataFrame:
    if separator == ",":
        rows = base.read_csv(path, scratch, required=("movieId", "title", "genres"))
        return rows.select(item_id=pl.col("movieId"), title=pl.col("title"), category=pl.col("genres"))
    if separator == "::":
        return _separated(path, separator, ("item_id", "title", "category")).drop(base.LINE)
    rows = _separated(path, "|", ("item_id", "title", "released", "video", "url", *_GENRES))
    genres = [pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in _GENRES]
    return rows.select("item_id", "title", category=pl.concat_str(genres, separator="|", ignore_nulls=True))


IMPORTER = base.Importer(
    format="movielens",
    licence="GroupLens, non-commercial",
    read=_read,
    options={"rating_min": "ratings below it are views (default 0: every rating is a purchase)"},
)
