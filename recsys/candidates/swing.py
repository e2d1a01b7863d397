"""Swing: links between items that several shoppers took together who share little else. Item-item, nearly symmetric.

Where co-visitation counts every shopper who took both, Swing counts pairs of them, each pair the less the more the two
have in common: shoppers who are alike anyway say little about any one link, and one shopper alone says nothing.

Built whole at every training (a million events take 1.0 s of CPU: simulated `crowd`, 134,000 items; 5.4 s where 20,000
shoppers share 5,000 items). Between trainings rows are made again as shoppers take more: `train-online` keeps who took
what (`index/swing_users.parquet` at first), says which rows that changes and publishes them as they become.

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
from recsys.candidates.ranked_list import with_half_life
from recsys.core import keys
from recsys.core.ids import find_rows
from recsys.core.items import ItemTable

NAME, USERS = "swing", "swing_users"
USERS_SCHEMA = pa.schema(
    [
        pa.field("user_key", pa.int64(), nullable=False),
        pa.field("item_key", pa.int64(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("time_us", pa.int64(), nullable=False),
        pa.field("num_users", pa.int64(), nullable=False),
    ]
)
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
    log = actions(events, items, until_us)
    return links(_taken(log, config), until_us, half_life_us(log, until_us, config.half_life_days_max), config)


def build_users(events: pl.DataFrame, items: ItemTable, until_us: int, config: CovisitConfig = DEFAULT) -> pa.Table:
    """index/swing_users.parquet: what rows are made from when more is taken; USERS_SCHEMA, users together.

    Only users who are among the newest of some item: no others make pairs. weight: fourth root of that of the strongest
    action, not faded; num_users: of the item, all there are.
    """
    log = actions(events, items, until_us)
    of_user = pl.DataFrame({"user_id": log["user_id"].unique(maintain_order=True)})
    of_user = of_user.with_columns(user_key=pl.Series(keys(of_user["user_id"]), dtype=pl.Int64))
    user_key = log.select("user", "user_id").unique().join(of_user, on="user_id").select("user", "user_key")
    newest = pl.int_range(pl.len()).over("item_key") < config.item_users_max
    rows = _taken(log, config).sort("time_us", "user", descending=[True, False])
    paired = rows.filter(pl.len().over("user") > 1).filter(newest)
    kept = pl.concat([rows.filter(newest)["user"], paired["user"]]).unique()
    table = (
        rows.filter(pl.col("user").is_in(kept.implode()))
        .join(user_key, on="user")
        .sort(["user_key", "time_us", "item_key"], descending=[False, True, False])
        .select(USERS_SCHEMA.names)
        .to_arrow()
        .cast(USERS_SCHEMA)
    )
    return with_half_life(table, half_life_us(log, until_us, config.half_life_days_max))


def links(
    taken: pl.DataFrame, until_us: int, half_life: float, config: CovisitConfig, wanted: Ints | None = None
) -> pa.Table:
    """The rows of the wanted items, None = of all; linked.SCHEMA, items ascending.

    taken: user, item_key, weight (fourth root of interest), time_us, num_users, a row for each item of each user; of a
    wanted item all users that make pairs, and of these all their items.
    """
    graph = _bipartite(taken, until_us, half_life, config)
    at = np.arange(len(graph.item_key)) if wanted is None else find_rows(graph.item_key, np.sort(wanted))
    at, parts = at[at >= 0], []
    for first in range(0, len(at), _ITEMS_PER_CALL):
        some = at[first : first + _ITEMS_PER_CALL]
        near, score = _links(
            graph.user, graph.item, graph.a, graph.user_at, graph.row, graph.item_at, graph.weight, graph.damp,
            config.alpha, some, config.neighbours_max, config.user_items_max,
        )  # fmt: skip
        found = near >= 0
        owner = np.repeat(graph.item_key[some], found.sum(axis=1))
        columns = [owner, graph.item_key[near[found]], score[found].astype(np.float32)]
        parts.append(pa.table(columns, schema=SCHEMA))
    return pa.concat_tables(parts).combine_chunks() if parts else SCHEMA.empty_table()


def _taken(log: pl.DataFrame, config: CovisitConfig) -> pl.DataFrame:
    """The newest items of every user, newest first, and how many users each item has."""
    return (
        log.group_by("user", "item_key")
        .agg(weight=pl.col("weight").max().sqrt().sqrt(), time_us=pl.col("time_us").max())
        .with_columns(num_users=pl.len().over("item_key"))
        .sort(["user", "time_us", "item_key"], descending=[False, True, False])
        .group_by("user", maintain_order=True)
        .head(config.user_items_max)
    )


def _bipartite(taken: pl.DataFrame, until_us: int, half_life: float, config: CovisitConfig) -> _Bipartite:
    rows = (
        taken.filter(pl.len().over("user") > 1)  # who has one item has nothing in common with anybody but that
        .with_columns(a=faded(until_us, 4 * half_life))
        .sort(["user", "time_us", "item_key"], descending=[False, True, False])
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
    damp: Floats, alpha: float, wanted: Ints, neighbours_max: int, user_items_max: int,
) -> tuple[Ints, Floats]:  # fmt: skip
    """Neighbours [C, K] of the wanted items [C], best first, ties by place; -1 = none; and their scores [C, K]."""
    near = np.full((len(wanted), neighbours_max), -1, np.int64)
    score = np.zeros((len(wanted), neighbours_max))
    num_items = len(item_at) - 1
    total, mine = np.zeros(num_items), np.zeros(num_items)
    seen_by, met_by = np.full(num_items, -1, np.int64), np.full(num_items, -1, np.int64)
    met, shared = np.empty(num_items, np.int64), np.empty(user_items_max, np.int64)
    for c, i in enumerate(wanted):
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
        near[c, : len(best)], score[c, : len(best)] = found[best], link[best]
    return near, score
