"""Regression links: what a user's whole set of items says about every other item, beyond what pairs say alone.

Where co-visitation counts an item once for each popular neighbour, the regression explains the popular ones away.

Shape legend: R user-item rows, K items that are modelled.
Source: Steck, "Embarrassingly shallow autoencoders for sparse data" (WWW 2019), section 3; truncated to the strongest
positive weights per item.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from recsys.candidates.behaviour import actions
from recsys.candidates.linked import SCHEMA, Memory
from recsys.core.items import ItemTable

NAME = "regression"
MEMORY = Memory(half_life_days=1e5, step_decay=0.7)
ITEMS_MAX = 4_096  # a dense K x K inverse: 64 MiB and a few seconds
PENALTY = 200.0
USER_ITEMS_MAX = 100
NEIGHBOURS_MAX = 96


def build(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/regression.parquet: per item the items it speaks for, strongest first.

    Of the ITEMS_MAX items with most users; a user counts with the newest USER_ITEMS_MAX of them.
    """
    rows = (
        actions(events, items, until_us)
        .group_by("user", "item_key")
        .agg(pl.col("time_us").max())
        .sort("user", "time_us", "item_key", descending=[False, True, False])
        .group_by("user", maintain_order=True)
        .head(USER_ITEMS_MAX)
    )
    counted = rows.group_by("item_key").agg(users=pl.len()).sort(["users", "item_key"], descending=[True, False])
    modelled = np.sort(counted["item_key"].head(ITEMS_MAX).to_numpy())
    if not len(modelled):
        return SCHEMA.empty_table()
    links_KK = _links(_gram(rows, modelled))
    kept = min(NEIGHBOURS_MAX, len(modelled) - 1)
    best_KN = np.sort(np.argpartition(-links_KK, kept, axis=1)[:, :kept], axis=1)
    score_KN = np.take_along_axis(links_KK, best_KN, axis=1)
    order_KN = np.argsort(-score_KN, axis=1, kind="stable")
    best_KN, score_KN = np.take_along_axis(best_KN, order_KN, 1), np.take_along_axis(score_KN, order_KN, 1)
    positive = score_KN > 0
    owner = np.repeat(modelled, positive.sum(axis=1))
    return pa.table([owner, modelled[best_KN[positive]], score_KN[positive].astype(np.float32)], schema=SCHEMA)


def _gram(rows: pl.DataFrame, modelled: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """How many users had both items, float32 [K, K]."""
    chosen = rows.filter(pl.col("item_key").is_in(modelled.tolist()))
    user, item = chosen["user"].to_numpy(), np.searchsorted(modelled, chosen["item_key"].to_numpy())
    num_items = len(modelled)
    gram = np.zeros(num_items * num_items, np.float32)
    for step in range(USER_ITEMS_MAX):
        at = np.flatnonzero(user[step:] == user[: len(user) - step])
        if not len(at):
            break
        pair, times = np.unique(item[at] * num_items + item[at + step], return_counts=True)
        gram[pair] += times
        if step:
            gram[pair % num_items * num_items + pair // num_items] += times
    return gram.reshape(num_items, num_items)


def _links(gram_KK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """B = -P / diag(P) with P the inverse of the penalised Gram matrix; the diagonal is 0."""
    inverse = np.linalg.inv(gram_KK + PENALTY * np.eye(len(gram_KK), dtype=np.float32))
    links: npt.NDArray[np.float32] = (-inverse / np.diag(inverse)).astype(np.float32)
    np.fill_diagonal(links, 0.0)
    return links
