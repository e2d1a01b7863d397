"""Swing: links between items that several shoppers took together who share little else. Item-item, nearly symmetric.

Where co-visitation counts every shopper who took both, Swing counts pairs of them, each pair the less the more the two
have in common: shoppers who are alike anyway say little about any one link, and one shopper alone says nothing.

Built whole at every training, not updated: a million events take 1.0 s of CPU (simulated `crowd`, 134,000 items), 5.4 s
where 20,000 shoppers share 5,000 items, in proportion to the rows, where the towers beside it take minutes. New events
alone would change all links of all items that their shoppers hold, popular ones first, and those are what costs.

Shape legend: R user-item rows, U users, M items, S rows kept per item, C items of one call, K links of an item.
Source: Yang et al., "Large Scale Product Graph Construction for Recommendation in E-commerce" (2020), the Swing score
with user weights; the fading with time is that of covisit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from feature_store.compiled.how import compiled
from recsys.candidates.behaviour import actions, faded, half_life_us
from recsys.candidates.covisit import DEFAULT, CovisitConfig
from recsys.candidates.linked import SCHEMA
from recsys.core.items import ItemTable

NAME = "swing"
_ITEMS_PER_CALL = 65_536  # bounds the links that are held in full width
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Bipartite:
    """Who took what, by user and by item.

    user [R], item [R], a [R]: rows of one user together, a = faded weight; user_at [U + 1]: where they start.
    row [S]: rows of one item together, newest first; item_at [M + 1]: where they start.
    weight [U], damp [M]: say of a user, and of an item.
    """

    item_key: Ints
    user: Ints
    item: Ints
    a: Floats
    user_at: Ints
    row: Ints
    item_at: Ints
    weight: Floats
    damp: Floats


def build(events: pl.DataFrame, items: ItemTable, until_us: int, config: CovisitConfig = DEFAULT) -> pa.Table:
    """index/swing.parquet: per item its nearest neighbours, best first.

    score(i, j) = sum over pairs of users u, v that have both of w_u w_v a_ui a_uj a_vi a_vj / (alpha + |I_u and I_v|),
    over (n_i + shrink) (n_j + shrink), since the pairs of n users grow with its square; w_u = 1 / sqrt(|I_u|), a_ui =
    fourth root of the decayed weight of the user's strongest action on i. I_u are the newest `user_items_max` items of
    the user, and of an item the newest `item_users_max` users make pairs, so that work is at most
    R x item_users_max x user_items_max / 2 steps and memory grows with R and M alone.
    """
    graph = _bipartite(actions(events, items, until_us), until_us, config)
    parts = []
    for first in range(0, len(graph.item_key), _ITEMS_PER_CALL):
        last = min(first + _ITEMS_PER_CALL, len(graph.item_key))
        near, score = _links(
            graph.user, graph.item, graph.a, graph.user_at, graph.row, graph.item_at, graph.weight, graph.damp,
            config.alpha, first, last, config.neighbours_max, config.user_items_max,
        )  # fmt: skip
        found = near >= 0
        owner = np.repeat(graph.item_key[first:last], found.sum(axis=1))
        columns = [owner, graph.item_key[near[found]], score[found].astype(np.float32)]
        parts.append(pa.table(columns, schema=SCHEMA))
    return pa.concat_tables(parts).combine_chunks() if parts else SCHEMA.empty_table()


def _bipartite(log: pl.DataFrame, until_us: int, config: CovisitConfig) -> _Bipartite:
    half_life = half_life_us(log, until_us, config.half_life_days_max)
    rows = (
        log.group_by("user", "item_key")
        .agg(weight=pl.col("weight").max().sqrt().sqrt(), time_us=pl.col("time_us").max())
        .with_columns(a=faded(until_us, 4 * half_life), num_users=pl.len().over("item_key"))
        .sort(["user", "time_us", "item_key"], descending=[False, True, False])
        .group_by("user", maintain_order=True)
        .head(config.user_items_max)
        .filter(pl.len().over("user") > 1)  # who has one item has nothing in common with anybody but that
    )
    user = rows["user"].rle_id().to_numpy().astype(np.int64)
    item_key, one, item = np.unique(rows["item_key"].to_numpy(), return_index=True, return_inverse=True)
    row = np.lexsort((user, -rows["time_us"].to_numpy(), item))
    held = item[row]
    kept = np.arange(len(row)) - np.searchsorted(held, held) < config.item_users_max
    num_items_u = np.bincount(user)
    return _Bipartite(
        item_key=item_key,
        user=user,
        item=item.astype(np.int64),
        a=rows["a"].to_numpy().astype(np.float64),
        user_at=np.append(0, np.cumsum(num_items_u)),
        row=row[kept],
        item_at=np.searchsorted(held[kept], np.arange(len(item_key) + 1)),
        weight=1.0 / np.sqrt(num_items_u),
        damp=1.0 / (rows["num_users"].to_numpy()[one] + config.shrink),
    )


@compiled
def _links(
    user: Ints, item: Ints, a: Floats, user_at: Ints, row: Ints, item_at: Ints, weight: Floats,
    damp: Floats, alpha: float, first: int, last: int, neighbours_max: int, user_items_max: int,
) -> tuple[Ints, Floats]:  # fmt: skip
    """Neighbours [C, K] of items first to last, best first, ties by place; -1 = none; and their scores [C, K]."""
    near = np.full((last - first, neighbours_max), -1, np.int64)
    score = np.zeros((last - first, neighbours_max))
    num_items = len(item_at) - 1
    total, mine = np.zeros(num_items), np.zeros(num_items)
    seen_by, met_by = np.full(num_items, -1, np.int64), np.full(num_items, -1, np.int64)
    met, shared = np.empty(num_items, np.int64), np.empty(user_items_max, np.int64)
    for i in range(first, last):
        num_met = 0
        for p in range(item_at[i], item_at[i + 1]):
            u = user[row[p]]
            for r in range(user_at[u], user_at[u + 1]):
                seen_by[item[r]], mine[item[r]] = p, a[r]
            for q in range(p + 1, item_at[i + 1]):
                v = user[row[q]]
                num_shared = 0
                for r in range(user_at[v], user_at[v + 1]):
                    if seen_by[item[r]] == p:
                        shared[num_shared] = r
                        num_shared += 1
                say = weight[u] * weight[v] * a[row[p]] * a[row[q]] / (alpha + num_shared)
                for s in range(num_shared):
                    j = item[shared[s]]
                    if j != i:
                        if met_by[j] != i:
                            met_by[j], met[num_met], total[j] = i, j, 0.0
                            num_met += 1
                        total[j] += say * mine[j] * a[shared[s]]
        found = np.sort(met[:num_met])
        found = found[total[found] > 0]  # what has faded to nothing is no link
        link = damp[i] * damp[found] * total[found]
        best = np.argsort(-link, kind="mergesort")[:neighbours_max]
        near[i - first, : len(best)], score[i - first, : len(best)] = found[best], link[best]
    return near, score
