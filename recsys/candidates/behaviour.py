"""What an action says about an item, and the action log as the index builders want it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store import UserFeatures
from recsys.core import EventType
from recsys.core.items import ItemTable

DAY_US = 86_400_000_000

# How strongly an action speaks for an item, by EventType number; an impression is the shop's doing and a return takes
# back, so neither counts as interest.
WEIGHT = np.array([0.0, 0.0, 1.0, 2.0, 3.0, 5.0, 0.0], np.float32)
WEIGHT.setflags(write=False)


def actions(events: pl.DataFrame, items: ItemTable, until_us: int) -> pl.DataFrame:
    """Interest in known items strictly before `until_us`, in event-time order.

    events: a dataset's `events`. Returns user (u32, from 1 in the order of user ids), user_id, item_key (i64), weight
    (f32), time_us (i64); rows of items that `items` does not know are left out.
    """
    weight = {t.label: float(WEIGHT[t]) for t in EventType if WEIGHT[t] > 0}
    known = pl.DataFrame(
        {"item_id": items.column("item_id"), "item_key": items.item_key},
        schema={"item_id": pl.String, "item_key": pl.Int64},  # said, or a catalogue without items has none
    )
    return (
        events.lazy()
        .select("user_id", "item_id", "event_type", time_us=pl.col("event_time").dt.epoch("us"))
        .filter((pl.col("time_us") < until_us) & pl.col("event_type").is_in(list(weight)))
        .join(known.lazy(), on="item_id", how="inner", maintain_order="left")
        .select(
            user=pl.col("user_id").rank("dense").cast(pl.UInt32),
            user_id="user_id",
            item_key="item_key",
            weight=pl.col("event_type").replace_strict(weight, return_dtype=pl.Float32),
            time_us="time_us",
        )
        .collect()
    )


def half_life_us(log: pl.DataFrame, until_us: int, days_max: float) -> float:
    """How fast interest fades: an eighth of what the log spans, at most `days_max`.

    A log of nine days and one of three years need different memories; without labels the span is what tells them apart.
    """
    first_us = log["time_us"].min()
    span_us = until_us - first_us if isinstance(first_us, int) else math.inf
    return min(days_max * DAY_US, max(span_us / 8, 1.0))


def faded(until_us: int, half_life: float) -> pl.Expr:
    """The weight column, halved for every `half_life` microseconds between time_us and `until_us`."""
    return pl.col("weight") * ((pl.col("time_us") - until_us) * (math.log(2.0) / half_life)).exp()


def daily_interest(log: pl.DataFrame) -> pl.DataFrame:
    """One row per user, item and UTC day with the strongest action of that day: one shopper cannot make a trend."""
    return (
        log.group_by("user", "item_key", pl.col("time_us") // DAY_US, maintain_order=True)  # `sums` keep the order
        .agg(weight=pl.col("weight").max(), last_us=pl.col("time_us").max())
        .select("user", "item_key", "weight", time_us="last_us")
    )


def sums(rows: pl.DataFrame, by: str, **terms: pl.Expr) -> pl.DataFrame:
    """`by` and the sum of each term over the rows of a group, groups and rows in their order: the same bits each time.

    Polars' own sum of a group adds up what each of its threads has, and who has what is up to the scheduler.
    """
    lists = rows.group_by(by, maintain_order=True).agg(**terms)
    return lists.with_columns(pl.col(*terms).list.sum())


def touched(user: UserFeatures) -> npt.NDArray[np.int64]:
    """Keys of the items the user has acted on (any event but an impression). Shape [P]."""
    acted = user.pair_count[:, EventType.VIEW :].any(axis=1)
    return np.asarray(user.pair_item_key[acted], np.int64)
