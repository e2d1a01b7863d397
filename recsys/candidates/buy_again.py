"""Buy again: what the user has bought and is due to buy once more, by how often and when others bought it again.

Shape legend: P user-item pairs.
Source: Bhagat et al., "Buy it again: modeling repeat purchase recommendations" (KDD 2018), sections 3.1 and 3.3: the
share of an item's customers who come back for it, times how often this one should by now.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from feature_store import UserFeatures
from recsys.candidates.behaviour import DAY_US, actions
from recsys.candidates.own_history import best_first
from recsys.candidates.ranked_list import read_table
from recsys.candidates.rows import rows_of
from recsys.core import Candidates, Deadline, EventType, Query
from recsys.core.items import ItemTable

NAME = "buy_again"
ANY_ITEM = -1  # the row of an item about which nothing is known: the shop's mean
SCHEMA = pa.schema(
    [
        pa.field("item_key", pa.int64(), nullable=False),
        pa.field("repeat_share", pa.float32(), nullable=False),
        pa.field("gap_days", pa.float32(), nullable=False),
    ]
)
_PRIOR_BUYERS = 10.0  # weight of the shop's mean in an item's own figures
_PURCHASE_WEIGHT_MIN = 5.0


def build(events: pl.DataFrame, items: ItemTable, until_us: int) -> pa.Table:
    """index/buy_again.parquet: per item the share of its buyers who bought it on another day too, and days between.

    Both are drawn to the shop's mean; the mean itself is the row of ANY_ITEM, which comes first.
    """
    log = actions(events, items, until_us).filter(pl.col("weight") >= _PURCHASE_WEIGHT_MIN)
    pairs = log.group_by("user", "item_key").agg(
        days=(pl.col("time_us") // DAY_US).n_unique(),
        span=(pl.col("time_us").max() - pl.col("time_us").min()) / DAY_US,
    )
    by_item = pairs.group_by("item_key").agg(
        buyers=pl.len().cast(pl.Float64),
        again=(pl.col("days") > 1).sum().cast(pl.Float64),
        gaps=(pl.col("days") - 1).sum().cast(pl.Float64),
        span=pl.col("span").filter(pl.col("days") > 1).sort().sum(),
    ).sort("item_key")  # fmt: skip
    buyers, again, gaps, span = (by_item[c].to_numpy() for c in ("buyers", "again", "gaps", "span"))
    share = again.sum() / max(buyers.sum(), 1.0)
    gap_days = span.sum() / gaps.sum() if gaps.sum() else 365.0
    repeat = (again + _PRIOR_BUYERS * share) / (buyers + _PRIOR_BUYERS)
    gap = (span + _PRIOR_BUYERS * gap_days) / (gaps + _PRIOR_BUYERS)
    columns = [
        np.append(ANY_ITEM, by_item["item_key"].to_numpy()),
        np.append(share, repeat).astype(np.float32),
        np.append(gap_days, gap).astype(np.float32),
    ]
    return pa.table(columns, schema=SCHEMA)


class BuyAgain:
    """Implements CandidateSource; `buy_again` is the rate at which purchases are expected, `buy_again_share` the item's
    repeat share, `buy_again_due` the time since the last purchase in expected gaps.
    """

    name = NAME

    def __init__(self, table: pa.Table) -> None:
        """table: SCHEMA, by item_key, ANY_ITEM first."""
        self._item_key = table.column("item_key").to_numpy()
        self._share = table.column("repeat_share").to_numpy()
        self._gap_days = table.column("gap_days").to_numpy()

    @classmethod
    def read(cls, path: Path) -> BuyAgain:
        """From an index file. Raises: CorruptData."""
        return cls(read_table(path, SCHEMA))

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """What the user has bought, most expected first; none when only new items are wanted."""
        bought = user.pair_count[:, EventType.PURCHASE] > 0
        if query.new_only or not bought.any():
            return Candidates.from_source(self.name, np.empty(0, np.int64), np.empty(0, np.float32))
        item_key = user.pair_item_key[bought]
        score, share, due = self._expected(user, bought, item_key)
        rows = best_first(item_key, score, limit)
        best = Candidates.from_source(self.name, item_key[rows], score[rows])
        return best.with_score(f"{self.name}_share", share[rows]).with_score(f"{self.name}_due", due[rows])

    def _expected(
        self, user: UserFeatures, bought: npt.NDArray[np.bool_], item_key: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Purchases a day still expected, the item's repeat share, and how overdue the next one is. Each [P]."""
        row = np.zeros(len(item_key), np.int64)
        place, known = rows_of(self._item_key, item_key)
        row[known] = place
        share, usual_gap = self._share[row], self._gap_days[row]
        days = user.pair_purchase_days[bought]
        since = np.maximum(user.as_of_us - user.pair_last_purchase_us[bought], 0) / DAY_US
        own_span = np.maximum(user.pair_last_purchase_us[bought] - user.pair_first_us[bought], 0) / DAY_US
        gap = (own_span + usual_gap) / days  # (own gaps + one usual gap) over their number
        due = since / np.maximum(gap, 0.5)
        alive = np.exp2(-np.maximum(due - 1.0, 0.0) / 2.0)
        rate = (days - 1 + share) / np.maximum(own_span + since + usual_gap, 0.5) * alive
        return rate.astype(np.float32), share.astype(np.float32), due.astype(np.float32)
