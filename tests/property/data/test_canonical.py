"""A canonical import keeps what is good, sets the rest aside, and is its own fixed point."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import BadInput
from recsys.core.events import EventBatch, EventKind
from recsys.data import Dataset, import_dataset, schema

IDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=0, max_size=6)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "event_id": IDS,
            "user_id": IDS,
            "item_id": IDS,
            "event_type": st.sampled_from(schema.EVENT_TYPES),
            "second": st.integers(0, 5),
            "position": st.none() | st.integers(-1, 3),
            "propensity": st.none() | st.sampled_from([-0.5, 0.0, 0.25, 1.0, 1.5]),
            "price": st.none() | st.integers(-5, 5_000),
            "quantity": st.none() | st.integers(0, 3),
        }
    ),
    min_size=1,
    max_size=30,
)


def is_good(row: dict[str, Any]) -> bool:
    return (
        bool(row["event_id"] and row["user_id"] and row["item_id"])
        and (row["position"] is None or row["position"] >= 1)
        and (row["propensity"] is None or 0 < row["propensity"] <= 1)
        and (row["price"] is None or row["price"] >= 0)
        and (row["quantity"] is None or row["quantity"] >= 1)
    )


@settings(max_examples=40, deadline=None)
@given(rows=ROWS)
def test_good_rows_stay_bad_rows_are_counted_and_a_second_import_changes_nothing(rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda r: r["second"])
    first_of_id = {r["event_id"]: i for i, r in reversed(list(enumerate(rows)))}
    good = [r for i, r in enumerate(rows) if is_good(r) and first_of_id[r["event_id"]] == i]
    t0 = datetime(2024, 11, 11, tzinfo=UTC)
    frame = pl.DataFrame(
        [{**r, "event_time": t0 + timedelta(seconds=r["second"])} for r in rows],
        schema_overrides={"position": pl.Int32, "propensity": pl.Float64, "price": pl.Int64, "quantity": pl.Int64},
    ).drop("second")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "src").mkdir()
        frame.write_parquet(root / "src" / "events.parquet")
        pl.DataFrame({"item_id": ["known"], "available_from": [t0]}).write_parquet(root / "src" / "items.parquet")
        if not good:
            with pytest.raises(BadInput, match="no event; rows set aside: "):
                import_dataset("canonical", root / "src", root / "once")
            return
        report = import_dataset("canonical", root / "src", root / "once")
        assert report.num_events == len(good)
        assert sum(report.rejected.values()) == len(rows) - len(good)
        dataset = Dataset.open(root / "once")
        assert dataset.events()["event_id"].to_list() == [r["event_id"] for r in good]
        assert dataset.events()["price"].to_list() == [r["price"] for r in good]
        again = import_dataset("canonical", root / "once", root / "twice")
        assert (again.hash, again.rejected) == (report.hash, {})
        batch = EventBatch.concat(list(dataset.event_batches(rows_max=7)))
        assert batch.of_kind(EventKind.ACTION).strings("event_id") == [r["event_id"] for r in good]


@settings(max_examples=25, deadline=None)
@given(
    seconds=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    cuts=st.lists(st.integers(-1, 9), min_size=0, max_size=4),
    rows_max=st.integers(1, 9),
)
def test_batches_of_adjoining_times_are_the_batches_of_the_whole(
    seconds: list[int], cuts: list[int], rows_max: int
) -> None:
    t0 = datetime(2024, 11, 11, tzinfo=UTC)
    t0_us = int(t0.timestamp()) * 1_000_000
    frame = pl.DataFrame(
        {
            "event_id": [f"e{n}" for n in range(len(seconds))],
            "user_id": ["u"] * len(seconds),
            "item_id": [f"i{n % 3}" for n in range(len(seconds))],
            "event_type": ["view"] * len(seconds),
            "event_time": [t0 + timedelta(seconds=s) for s in sorted(seconds)],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "src").mkdir()
        frame.write_parquet(root / "src" / "events.parquet")
        pl.DataFrame({"item_id": ["i0"]}).write_parquet(root / "src" / "items.parquet")
        import_dataset("canonical", root / "src", root / "d")
        dataset = Dataset.open(root / "d")
        edges = [None, *(t0_us + c * 1_000_000 for c in sorted(cuts)), None]
        parts = [
            batch
            for low, high in pairwise(edges)
            for batch in dataset.event_batches(from_us=low, before_us=high, rows_max=rows_max)
        ]
        assert all(0 < len(batch) <= rows_max for batch in parts)
        whole = EventBatch.concat(list(dataset.event_batches()))
        assert EventBatch.concat(parts).table.equals(whole.table)
