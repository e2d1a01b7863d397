"""Training examples of the towers: (user, time, item acted on), with the history strictly before that time.

All actions of one user with one timestamp (a basket) share one history that holds none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.core.events import EVENT_TYPE_BY_LABEL, EventType
from recsys.core.ids import keys
from recsys.models.embeddings import Vocabulary
from recsys.models.history import Histories
from recsys.models.jagged import range_rows
from recsys.training.windows import DAY_US

_FADED_MIN = 1e-6  # of the newest's weight: a batch of old examples alone has a loss too
# How much more a purchase says about taste than a view.
BEHAVIOUR_WEIGHT: dict[EventType, float] = {
    EventType.VIEW: 1.0,
    EventType.FAVORITE: 2.0,
    EventType.CART: 2.0,
    EventType.PURCHASE: 3.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Actions:
    """V actions (no impressions, no returns) by user, then time. Columns [V].

    history_start: first row of the same user; history_stop: first row of the same user and timestamp.
    """

    item_key: npt.NDArray[np.int64]
    event_type: npt.NDArray[np.int64]
    time_us: npt.NDArray[np.int64]
    history_start: npt.NDArray[np.int64]
    history_stop: npt.NDArray[np.int64]

    @classmethod
    def from_events(cls, events: pl.DataFrame) -> Actions:
        """From a dataset's events in any order of users; ties in time keep their order."""
        labels = [t.label for t in BEHAVIOUR_WEIGHT]
        chosen = events.filter(pl.col("event_type").is_in(labels)).select(
            "user_id", "item_id", "event_type", pl.col("event_time").dt.epoch("us").alias("time_us")
        )
        chosen = chosen.sort("user_id", "time_us", maintain_order=True)
        time_us = chosen["time_us"].to_numpy()
        user = chosen["user_id"].rank("dense").to_numpy().astype(np.int64) if len(chosen) else np.empty(0, np.int64)
        new_user = np.diff(user, prepend=-1) != 0
        new_time = new_user | (np.diff(time_us, prepend=-1) != 0)
        row = np.arange(len(chosen))
        return cls(
            item_key=_item_keys(chosen["item_id"]),
            event_type=chosen["event_type"].replace_strict(EVENT_TYPE_BY_LABEL, return_dtype=pl.Int64).to_numpy(),
            time_us=time_us,
            history_start=np.maximum.accumulate(np.where(new_user, row, 0)),
            history_stop=np.maximum.accumulate(np.where(new_time, row, 0)),
        )

    def __len__(self) -> int:
        return len(self.item_key)

    def histories(self, rows: npt.NDArray[np.int64], length_max: int) -> Histories:
        """What each action's user had done strictly before its time, at most `length_max` of it."""
        lengths = self.history_lengths(rows, length_max)
        flat = range_rows(self.history_stop[rows] - lengths, lengths)
        return Histories(
            item_key=self.item_key[flat],
            event_type=self.event_type[flat],
            time_us=self.time_us[flat],
            lengths=lengths,
            as_of_us=self.time_us[rows],
        )

    def history_lengths(self, rows: npt.NDArray[np.int64], length_max: int) -> npt.NDArray[np.int64]:
        """Actions in each of `histories`, int64 [rows]."""
        lengths: npt.NDArray[np.int64] = np.minimum(self.history_stop[rows] - self.history_start[rows], length_max)
        return lengths

    def chance(self, vocabulary: Vocabulary) -> npt.NDArray[np.float64]:
        """Share of actions on each item, by its row in the vocabulary; row 0 stays 0. float64 [rows]."""
        acted, counts = np.unique(self.item_key, return_counts=True)
        chance = np.zeros(vocabulary.num_rows)
        chance[vocabulary.rows(acted)] = counts / counts.sum()
        return chance

    def weights(self, half_life_days: float = 0.0) -> npt.NDArray[np.float32]:
        """Behaviour weight of each action [V], halved for every half-life between it and the newest; 0 = never."""
        table = np.zeros(len(EventType), np.float32)
        for event_type, weight in BEHAVIOUR_WEIGHT.items():
            table[event_type] = weight
        if not half_life_days or not len(self):
            return table[self.event_type]
        age_days = (self.time_us.max() - self.time_us) / DAY_US
        faded: npt.NDArray[np.float32] = np.exp2(-age_days / half_life_days).clip(_FADED_MIN).astype(np.float32)
        return table[self.event_type] * faded


def _item_keys(item_id: pl.Series) -> npt.NDArray[np.int64]:
    distinct = item_id.unique()
    table = pl.DataFrame({"item_id": distinct, "key": keys(distinct)})
    found: npt.NDArray[np.int64] = (
        item_id.to_frame().join(table, on="item_id", how="left", maintain_order="left")["key"].to_numpy()
    )
    return found
