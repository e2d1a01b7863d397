"""A small dataset directory to open, cut and damage."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from recsys.data import write_dataset

T0 = datetime(2024, 11, 11, tzinfo=UTC)


def events(num: int = 10) -> pl.DataFrame:
    """One event a minute; users u0, u1, items i0 to i2; the third at the same time as the second."""
    minutes = [max(0, n - (n == 2)) for n in range(num)]
    return pl.DataFrame(
        {
            "event_id": [f"e{n}" for n in range(num)],
            "user_id": [f"u{n % 2}" for n in range(num)],
            "item_id": [f"i{n % 3}" for n in range(num)],
            "event_type": ["purchase" if n % 4 == 3 else "view" for n in range(num)],
            "event_time": [T0 + timedelta(minutes=m) for m in minutes],
            "price": [100 + n for n in range(num)],
        },
        schema_overrides={"event_time": pl.Datetime("us", "UTC")},
    )


def items() -> pl.DataFrame:
    """i0 and i1 listed at T0, i2 two minutes later."""
    return pl.DataFrame(
        {
            "item_id": ["i0", "i1", "i2"],
            "available_from": [T0, T0, T0 + timedelta(minutes=1)],
            "title": ["红 Zero", "One", None],
            "price": [100, 200, None],
        },
        schema_overrides={"available_from": pl.Datetime("us", "UTC")},
    )


@pytest.fixture
def dataset_dir(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", events=events(), items=items(), info={"format": "test"})
    return tmp_path / "data"
