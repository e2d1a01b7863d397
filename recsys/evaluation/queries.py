"""Who is asked about, when, and what counts as right: the queries of the replay protocols.

`frozen`: one query per user at the cut. `online`: one per user and session (or timestamp) after the cut.
What is right is what users did, by event_time, whenever it was learnt; what was before a query, by known_at as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl

from recsys.core.errors import BadInput

Task = Literal["all", "new-only"]
TASKS: tuple[Task, ...] = ("all", "new-only")
ANY_POSITIVE = ("view", "favorite", "cart", "purchase")  # all but impression and return
RARE_EVENTS = 5  # of an item with fewer than these what is learnt from events knows little
QUERY_SCHEMA = {
    "query_id": pl.String(),
    "user_id": pl.String(),
    "query_time": pl.Int64(),
    "relevant": pl.List(pl.String()),
}


def parse_positives(text: str) -> tuple[str, ...]:
    """`purchase,cart` or `any` as event type labels.

    Raises: BadInput for a word that names no positive behaviour, or none at all.
    """
    if text.strip() == "any":
        return ANY_POSITIVE
    return _check_positives([word.strip() for word in text.split(",") if word.strip()])


def make_queries(
    events: pl.DataFrame,
    *,
    from_us: int,
    to_us: int,
    positives: Sequence[str],
    task: Task = "all",
    queries_max: int | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Queries of protocol `frozen`: users with an event known before `from_us` and a positive in [from_us, to_us).

    events: user_id, item_id, event_type (label), event_time and perhaps known_at (Datetime[us, UTC]; null or absent =
    event_time), any order. Times in microseconds UTC.
    Returns [query_id, user_id, query_time (int64 microseconds, = from_us), relevant (sorted distinct item ids)], sorted
    by user_id. Items never seen before the cut stay relevant (they are misses). Task `new-only` takes away what the
    user is known to have touched before the cut (any event but an impression) and drops queries left with nothing.
    `queries_max` is a sample by `seed` that does not depend on the order of rows.
    Raises: BadInput for an empty period, an unknown positive or task.
    """
    _check(from_us, to_us, positives, task, queries_max)
    actions = _actions(events)
    before = actions.filter(pl.col("known") < from_us)
    wanted = actions.filter(pl.col("at").is_between(from_us, to_us, closed="left") & _is_positive(positives))
    pairs = wanted.select("user_id", "item_id").unique().join(before.select("user_id").unique(), on="user_id")
    if task == "new-only":
        touched = before.filter(pl.col("event_type") != "impression").select("user_id", "item_id").unique()
        pairs = pairs.join(touched, on=["user_id", "item_id"], how="anti")
    return _finish(pairs.with_columns(query_time=pl.lit(from_us, pl.Int64())), queries_max, seed)


def make_online_queries(
    events: pl.DataFrame,
    *,
    from_us: int,
    to_us: int,
    positives: Sequence[str],
    task: Task = "all",
    queries_max: int | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """Queries of protocol `online`: one per user and session (timestamp where there is none) with a positive.

    The query's time is that of the session's first event in [from_us, to_us), so that everything strictly before it
    excludes the session itself; the user has an event known before that time. Otherwise as `make_queries`; the sample
    keeps whole queries, sorted by time.
    """
    _check(from_us, to_us, positives, task, queries_max)
    actions = _actions(events)
    session = pl.col("session_id") if "session_id" in actions.columns else pl.lit(None, pl.String())
    period = actions.filter(pl.col("at").is_between(from_us, to_us, closed="left")).with_columns(
        session=pl.coalesce(session, pl.col("at").cast(pl.String()))
    )
    period = period.with_columns(query_time=pl.col("at").min().over("user_id", "session"))
    pairs = period.filter(_is_positive(positives)).select("user_id", "query_time", "item_id").unique()
    first_seen = actions.group_by("user_id").agg(first=pl.col("known").min())
    pairs = pairs.join(first_seen, on="user_id").filter(pl.col("first") < pl.col("query_time"))
    if task == "new-only":
        touched = actions.filter(pl.col("event_type") != "impression")
        touched = touched.group_by("user_id", "item_id").agg(touched=pl.col("known").min())
        pairs = pairs.join(touched, on=["user_id", "item_id"], how="left")
        pairs = pairs.filter(~(pl.col("touched") < pl.col("query_time")).fill_null(False))
    return _finish(pairs.select("user_id", "query_time", "item_id"), queries_max, seed).sort("query_time", "user_id")


def with_rare(queries: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """The queries with a column `rare`: what of `relevant` has fewer than RARE_EVENTS events known before its time.

    queries: as made here. events: as they are made from; impressions do not count. An item never seen is rare.
    """
    acted = _actions(events).filter(pl.col("event_type") != "impression").select("item_id", at="known").sort("at")
    acted = acted.with_columns(so_far=pl.int_range(1, pl.len() + 1).over("item_id"))
    pairs = queries.select("query_id", at="query_time", item_id="relevant").explode("item_id").sort("at")
    known = pairs.join_asof(
        acted, on="at", by="item_id", strategy="backward", allow_exact_matches=False, check_sortedness=False
    )
    rare = known.filter(pl.col("so_far").fill_null(0) < RARE_EVENTS)
    rare = rare.group_by("query_id").agg(rare=pl.col("item_id").sort())
    return queries.join(rare, on="query_id", how="left", maintain_order="left").with_columns(
        pl.col("rare").fill_null(pl.lit([], pl.List(pl.String())))
    )


def rare_only(queries: pl.DataFrame) -> pl.DataFrame:
    """Of queries `with_rare` those with a rare item, which alone is relevant then."""
    return queries.filter(pl.col("rare").list.len() > 0).with_columns(relevant="rare")


def _actions(events: pl.DataFrame) -> pl.DataFrame:
    named = events.filter(pl.col("user_id").is_not_null() & pl.col("item_id").is_not_null())
    known = "known_at" if "known_at" in events.columns else "event_time"
    times = named.with_columns(at=pl.col("event_time").dt.epoch("us"), known=pl.col(known).dt.epoch("us"))
    return times.with_columns(known=pl.max_horizontal("at", "known"))  # passes over nulls: those were known at once


def _is_positive(positives: Sequence[str]) -> pl.Expr:
    return pl.col("event_type").is_in(list(positives))


def _finish(pairs: pl.DataFrame, queries_max: int | None, seed: int) -> pl.DataFrame:
    queries = (
        pairs.group_by("user_id", "query_time").agg(relevant=pl.col("item_id").sort()).sort("user_id", "query_time")
    )
    if queries_max is not None and len(queries) > queries_max:
        chosen = np.random.default_rng(seed).choice(len(queries), queries_max, replace=False)
        queries = queries[np.sort(chosen)]
    query_id = pl.concat_str("user_id", pl.lit("@"), pl.col("query_time").cast(pl.String()))
    return queries.with_columns(query_id=query_id).select(list(QUERY_SCHEMA)).cast(QUERY_SCHEMA)  # type: ignore[arg-type]


def _check_positives(words: Sequence[str]) -> tuple[str, ...]:
    unknown = [w for w in words if w not in ANY_POSITIVE]
    if unknown or not words:
        raise BadInput(
            "--positives",
            came=", ".join(unknown) or "nothing",
            expected=f"a comma list of {', '.join(ANY_POSITIVE)}, or any",
            fix="Write e.g. --positives purchase,cart; importers map buy to purchase and fav to favorite.",
        )
    return tuple(dict.fromkeys(words))


def _check(from_us: int, to_us: int, positives: Sequence[str], task: str, queries_max: int | None) -> None:
    _check_positives(positives)
    if task not in TASKS:
        raise BadInput("--task", came=task, expected=" or ".join(TASKS), fix="Choose one of them.")
    if from_us >= to_us:
        raise BadInput("replay period", came=f"[{from_us}, {to_us})", expected="from < to", fix="Move --from or --to.")
    if queries_max is not None and queries_max < 1:
        raise BadInput("--queries-max", came=queries_max, expected="1 or more", fix="Leave it out to ask all.")
