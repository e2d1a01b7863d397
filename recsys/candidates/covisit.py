"""Co-visitation: what others took together with what this user took lately. Item-item, symmetric, cosine-like.

Shape legend: R user-item rows, M items.
Source: item-based collaborative filtering with cosine similarity (Sarwar et al. 2001, section 3.1.1), with the time
decay of Ding & Li 2005 ("Time weight collaborative filtering", section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from recsys.candidates.behaviour import actions, faded, half_life_us, sums
from recsys.candidates.linked import SCHEMA, Linked, Memory
from recsys.candidates.ranked_list import read_table
from recsys.core import RunDirectory
from recsys.core.config import in_range, section
from recsys.core.items import ItemTable

NAME = "covisit"
SECTION = "candidates.covisit"
_PAIRS_BUFFER_MAX = 8_000_000  # pairs held before they are summed


@section("candidates.covisit")
@dataclass(frozen=True, kw_only=True)
class CovisitConfig:
    """How the co-visitation indexes, covisit and swing, are built and asked.

    neighbours_max: kept per item. half_life_days_max: how fast a co-visit fades. shrink: damps pairs of rare items.
    covisit: window_items: an item is paired with that many of the same user's items before it.
    swing: user_items_max, item_users_max: newest items of a user, and users of an item, that make pairs; alpha: damps
    pairs of users with little in common.
    seeds_max: items of the user that are looked up. seed_half_life_days: how fast the user's own past fades.
    """

    window_items: int = 24
    neighbours_max: int = 64
    half_life_days_max: float = 15.0
    shrink: float = 8.0
    user_items_max: int = 50
    item_users_max: int = 100
    alpha: float = 5.0
    seeds_max: int = 100
    seed_half_life_days: float = 60.0

    def __post_init__(self) -> None:
        in_range("candidates.covisit.window_items", self.window_items, 1, 1_000)
        in_range("candidates.covisit.neighbours_max", self.neighbours_max, 1, 1_000)
        in_range("candidates.covisit.half_life_days_max", self.half_life_days_max, 1e-3, 1e5)
        in_range("candidates.covisit.shrink", self.shrink, 0, 1e6)
        in_range("candidates.covisit.user_items_max", self.user_items_max, 2, 10_000)
        in_range("candidates.covisit.item_users_max", self.item_users_max, 2, 10_000)
        in_range("candidates.covisit.alpha", self.alpha, 0, 1e6)
        in_range("candidates.covisit.seeds_max", self.seeds_max, 1, 10_000)
        in_range("candidates.covisit.seed_half_life_days", self.seed_half_life_days, 1e-3, 1e5)

    @property
    def memory(self) -> Memory:
        """How a user's past counts when the indexes are asked."""
        return Memory(items_max=self.seeds_max, half_life_days=self.seed_half_life_days)


DEFAULT = CovisitConfig()


def config_of(run: RunDirectory) -> CovisitConfig:
    """As the run's indexes were built. Raises: VersionMismatch for settings that this release does not know."""
    with run.settings_of("covisit"):
        return CovisitConfig(**run.manifest["config"].get(SECTION, {}))


def build(events: pl.DataFrame, items: ItemTable, until_us: int, config: CovisitConfig = DEFAULT) -> pa.Table:
    """index/covisit.parquet: per item its nearest neighbours, best first.

    score(i, j) = sum over users of a_ui a_uj / (sqrt(|a_i|^2 |a_j|^2) + shrink), a_ui = decayed weight of the user's
    strongest action on i, over pairs at most `window_items` apart in the user's sequence.
    """
    log = actions(events, items, until_us)
    half_life = half_life_us(log, until_us, config.half_life_days_max)
    rows = (
        log.group_by("user", "item_key")
        .agg(weight=pl.col("weight").max().sqrt(), time_us=pl.col("time_us").max())
        .with_columns(a=faded(until_us, 2 * half_life))
        .sort("user", "time_us", "item_key")
    )
    if rows.is_empty():
        return SCHEMA.empty_table()
    item_key, item = np.unique(rows["item_key"].to_numpy(), return_inverse=True)
    a = rows["a"].to_numpy().astype(np.float64)
    pairs = _pair_sums(rows["user"].to_numpy(), item, a, len(item_key), config.window_items)
    norm = np.sqrt(np.bincount(item, a * a, minlength=len(item_key)))
    i, j = np.divmod(pairs["pair"].to_numpy(), len(item_key))
    most = norm[i] * norm[j] + config.shrink * norm.mean() ** 2  # 0 where all is so long ago that nothing is left of it
    score = np.divide(pairs["sum"].to_numpy(), most, out=np.zeros(len(most)), where=most > 0)
    both = pl.DataFrame(
        {
            "item_key": item_key[np.concatenate([i, j])],
            "neighbour_key": item_key[np.concatenate([j, i])],
            "score": np.concatenate([score, score]).astype(np.float32),
        }
    )
    return (
        both.sort(["item_key", "score", "neighbour_key"], descending=[False, True, False])
        .group_by("item_key", maintain_order=True)
        .head(config.neighbours_max)
        .select(SCHEMA.names)
        .to_arrow()
        .cast(SCHEMA)
    )


def _pair_sums(
    user: npt.NDArray[np.uint32],
    item: npt.NDArray[np.int64],
    a: npt.NDArray[np.float64],
    num_items: int,
    window_items: int,
) -> pl.DataFrame:
    """Sum of a_ui a_uj over rows of one user at most `window_items` apart: columns pair (i * M + j, i < j) and sum."""
    totals = pl.DataFrame(schema={"pair": pl.Int64, "sum": pl.Float64})
    waiting: list[pl.DataFrame] = []
    for step in range(1, min(window_items, len(user) - 1) + 1):
        at = np.flatnonzero(user[step:] == user[:-step])
        if not len(at):
            break
        first, second = item[at], item[at + step]
        pair = np.minimum(first, second) * num_items + np.maximum(first, second)
        waiting.append(pl.DataFrame({"pair": pair, "sum": a[at] * a[at + step]}))
        if sum(map(len, waiting)) > _PAIRS_BUFFER_MAX:
            totals, waiting = _summed([totals, *waiting]), []
    return _summed([totals, *waiting]).sort("pair")


def _summed(parts: list[pl.DataFrame]) -> pl.DataFrame:
    return sums(pl.concat(parts), "pair", sum=pl.col("sum"))


class Covisit(Linked):
    """Implements CandidateSource over the index; `covisit_max` is the strongest single link, `covisit` their sum."""

    def __init__(self, table: pa.Table, config: CovisitConfig = DEFAULT) -> None:
        """table: linked.SCHEMA, sorted by item_key, best neighbour first."""
        super().__init__(NAME, table, config.memory)

    @classmethod
    def read(cls, path: Path, config: CovisitConfig = DEFAULT) -> Covisit:
        """From an index file. Raises: CorruptData."""
        return cls(read_table(path, SCHEMA), config)
