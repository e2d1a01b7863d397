"""The impression join: what was shown and what became of it within the attribution window.

An action belongs to the slate it names (request_id), else to any: to the latest one that showed the item to the user,
no more than the window before it. Several slates may have one request_id.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import polars as pl
from double11.v1.sample_pb2 import Sample

from recsys.core import EventBatch, EventKind, EventType, keys

WINDOW_US = 24 * 3_600 * 1_000_000
_SHOWN = ("event_id", "request_id", "user_id", "item_id", "event_time", "position", "propensity", "stress")
_EXTRA = ("source", "offset")
_BY_NAME_ELSE_ANY: tuple[tuple[Literal["semi", "anti"], list[str]], ...] = (
    ("semi", ["user_id", "item_id", "request_id"]),
    ("anti", ["user_id", "item_id"]),
)


def join(events: EventBatch, *, window_us: int = WINDOW_US, watermark_us: int | None = None) -> pl.DataFrame:
    """Samples of the impressions among N events, in time order; one row each.

    watermark_us: only impressions whose window is over by then; None = all. Columns: those of sample.proto, with
    `action_types` a sorted list of distinct EventType numbers.
    """
    frame = pl.from_arrow(events.table)
    assert isinstance(frame, pl.DataFrame)
    samples = join_actions(frame.filter(pl.col("kind") == int(EventKind.ACTION)), window_us=window_us)
    return samples if watermark_us is None else samples.filter(pl.col("event_time_us") + window_us <= watermark_us)


def join_actions(actions: pl.DataFrame, *, window_us: int) -> pl.DataFrame:
    """As `join`, of rows with the columns of an EventBatch that are needed; source and offset are kept if there."""
    is_shown = pl.col("event_type") == int(EventType.IMPRESSION)
    kept = [*_SHOWN, *(c for c in _EXTRA if c in actions.columns)]
    shown = actions.filter(is_shown).select(kept).sort("event_time", maintain_order=True)
    acted = actions.filter(~is_shown).select("user_id", "item_id", "event_type", "request_id", acted_at="event_time")
    pair = ["user_id", "item_id"]
    target = shown.select(*pair, "request_id", shown_at="event_time", shown_id="event_id")
    latest = [
        acted.join(target, on=[*pair, "request_id"], how=how)
        .sort("acted_at")
        .join_asof(
            target.select(*by, "shown_at", "shown_id"),
            left_on="acted_at",
            right_on="shown_at",
            by=by,
            strategy="backward",
            tolerance=window_us,
            check_sortedness=False,
        )
        .drop_nulls("shown_id")
        .select("shown_id", "event_type", "acted_at")
        for how, by in _BY_NAME_ELSE_ANY
    ]
    matched = pl.concat(latest)
    per_slot = matched.group_by("shown_id").agg(
        action_types=pl.col("event_type").cast(pl.Int32).unique().sort(), action_time_us=pl.col("acted_at").min()
    )
    out = shown.join(per_slot, left_on="event_id", right_on="shown_id", how="left", maintain_order="left")
    sample_id = pl.Series("sample_id", [f"{k:016x}" for k in keys(shown["event_id"].to_list()).tolist()], pl.String)
    return out.with_columns(
        sample_id, pl.col("action_types").fill_null([]), pl.col("action_time_us").fill_null(0)
    ).rename({"event_time": "event_time_us"}).drop("event_id")  # fmt: skip


def to_messages(samples: pl.DataFrame, *, late: bool = False) -> Iterator[Sample]:
    """Samples as records of the `samples` topic. late: they replace samples that were sent when the window closed."""
    for row in samples.drop(_EXTRA, strict=False).iter_rows(named=True):
        yield Sample(**{k: v for k, v in row.items() if v is not None}, late=late)
