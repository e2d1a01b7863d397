"""Point-in-time join: for each label the latest feature value that was valid and known strictly before it.

A value counts from max(event_time, known_at) on. Polars' join_asof does the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from recsys.core import BadInput

_TIME, _FROM, _HELD = "event_time", "_valid_from", "_event_time"


def join(
    labels: pl.DataFrame,
    values: pl.DataFrame,
    *,
    by: str | Sequence[str],
    time: str = "event_time",
    max_age_us: int | None = None,
) -> pl.DataFrame:
    """The labels in their order, with the value columns of `values` (null where there is none).

    labels: columns `by` and `time`. values: columns `by`, `event_time`, optional `known_at`, and the values. Times are
    Datetime or int64 microseconds, of one type in both. A value of the label's own time is not used: another row of
    the same basket would leak the label. max_age_us: older values (by event_time) become null.
    Where several values became valid at one time, the one with the latest event_time wins, then the last row.
    Raises: BadInput for missing columns or times of different types.
    """
    keys = [by] if isinstance(by, str) else list(by)
    for name, frame, needed in (("labels", labels, [*keys, time]), ("values", values, [*keys, "event_time"])):
        if missing := [c for c in needed if c not in frame.columns]:
            raise BadInput(name, came=f"no {', '.join(missing)}", expected=", ".join(needed), fix="Add the columns.")
    if labels.schema[time] != values.schema["event_time"]:
        came = f"{labels.schema[time]} and {values.schema['event_time']}"
        raise BadInput("label and value times", came=came, expected="one type", fix="Cast one of them.")
    features = [c for c in values.columns if c not in (*keys, "event_time", "known_at")]
    known = pl.col("known_at").fill_null(pl.col("event_time")) if "known_at" in values.columns else pl.col("event_time")
    right = (
        values.lazy()
        .select(
            *keys, *features, pl.col("event_time").alias(_HELD), pl.max_horizontal("event_time", known).alias(_FROM)
        )
        .sort(_FROM, _HELD, maintain_order=True)
        # A value that became known late must not replace one of a later event time.
        .filter(pl.col(_HELD) == pl.col(_HELD).cum_max().over(keys))
    )
    left = labels.lazy().with_row_index("_row").sort(time, maintain_order=True)
    joined = left.join_asof(
        right,
        left_on=time,
        right_on=_FROM,
        by=keys,
        strategy="backward",
        allow_exact_matches=False,
        check_sortedness=False,
    )
    if max_age_us is not None:
        age = (pl.col(time) - pl.col(_HELD)).cast(pl.Int64)
        if labels.schema[time] != pl.Int64:
            age = (pl.col(time) - pl.col(_HELD)).dt.total_microseconds()
        joined = joined.with_columns(pl.when(age <= max_age_us).then(pl.col(c)).alias(c) for c in features)
    return joined.sort("_row").drop("_row", _FROM, _HELD, strict=False).collect()
