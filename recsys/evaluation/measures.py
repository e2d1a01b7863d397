"""Ranking measures, one row per query. Full catalogue, binary gain, no sampled negatives.

Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques" (TOIS 2002), section 2, with
binary gain and the ideal of min(|relevant|, k) hits; recall, hit rate and reciprocal rank as in Manning et al.,
"Introduction to Information Retrieval", chapter 8.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from recsys.core.errors import BadInput

# name -> (what, cutoff): the columns of a report
MEASURES: dict[str, tuple[str, int]] = {
    "recall@10": ("recall", 10),
    "recall@20": ("recall", 20),
    "recall@100": ("recall", 100),
    "ndcg@10": ("ndcg", 10),
    "ndcg@20": ("ndcg", 20),
    "hr@10": ("hr", 10),
    "mrr@10": ("mrr", 10),
}


def measures(slates: pl.DataFrame, queries: pl.DataFrame) -> pl.DataFrame:
    """Every measure of MEASURES for each query, in the order of `queries`; a query without a slate scores 0.

    slates: query_id, rank (from 1), item_id, of one arm; rows in any order. queries: query_id, relevant (non-empty
    list of distinct item ids). Returns query_id and one float64 column per measure, all in [0, 1].
    Raises: BadInput when a slate repeats an item or a rank, has a rank below 1, or a query has nothing relevant.
    """
    _check(slates, queries)
    relevant = queries.select("query_id", "relevant").explode("relevant").rename({"relevant": "item_id"})
    hits = slates.select("query_id", "rank", "item_id").join(relevant, on=["query_id", "item_id"])
    rank = pl.col("rank").cast(pl.Float64)
    columns = []
    for name, (what, k) in MEASURES.items():
        within = rank.filter(pl.col("rank") <= k)
        value = {
            "recall": within.len().cast(pl.Float64),
            "ndcg": (1.0 / (within + 1.0).log(2.0)).sum(),
            "hr": (within.len() > 0).cast(pl.Float64),
            "mrr": 1.0 / within.min(),
        }[what]
        columns.append(value.alias(name))
    found = hits.group_by("query_id").agg(columns)
    size = queries.select("query_id", size=pl.col("relevant").list.len())
    table = size.join(found, on="query_id", how="left", maintain_order="left")
    table = table.with_columns(pl.col(list(MEASURES)).fill_null(0.0))
    return table.select("query_id", *(_normalised(name, what, k) for name, (what, k) in MEASURES.items()))


def coverage(slates: pl.DataFrame, num_items: int, k: int = 10) -> float:
    """Share of the catalogue (`num_items` items) that is in the first k places of at least one slate."""
    shown = slates.filter(pl.col("rank") <= k).select(pl.col("item_id").n_unique()).item()
    return float(shown) / num_items if num_items else 0.0


def _normalised(name: str, what: str, k: int) -> pl.Expr:
    if what == "recall":
        return pl.col(name) / pl.col("size")
    if what == "ndcg":
        ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))])
        best = pl.lit(pl.Series(ideal)).gather(pl.col("size").clip(upper_bound=k))
        return (pl.col(name) / best).clip(upper_bound=1.0)  # a perfect slate may sum to 1 + 1 ulp
    return pl.col(name)


def _check(slates: pl.DataFrame, queries: pl.DataFrame) -> None:
    fix = "Give each arm's slates to measures() on their own, ranks 1, 2, 3 ... and items distinct."
    for column in ("item_id", "rank"):
        twice = slates.filter(pl.struct("query_id", column).is_duplicated())
        if len(twice):
            raise BadInput(f"slates, {column}", came=f"{twice.row(0)} twice", expected="once per query", fix=fix)
    if len(slates) and int(slates.select(pl.col("rank").min()).item()) < 1:
        raise BadInput("slates, rank", came="a rank below 1", expected="ranks from 1", fix=fix)
    if queries.select((pl.col("relevant").list.len().fill_null(0) == 0).any()).item():
        raise BadInput("queries", came="nothing relevant", expected="one item or more", fix="Drop such queries.")
