from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from recsys.core.errors import BadInput, Conflict
from recsys.data import Dataset, DatasetWriter, write_dataset

TIME = pl.Datetime("us", "UTC")


def frames(dataset_dir: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    dataset = Dataset.open(dataset_dir)
    return dataset.events(), dataset.items()


def test_chunks_give_the_same_rows_as_one_frame(dataset_dir: Path, tmp_path: Path) -> None:
    events, items = frames(dataset_dir)
    write_dataset(tmp_path / "chunks", events=[events[:0], events[:4], events[4:4], events[4:]], items=items, info={})
    assert Dataset.open(tmp_path / "chunks").events().equals(events)


def test_an_existing_directory_is_never_touched(dataset_dir: Path) -> None:
    events, items = frames(dataset_dir)
    with pytest.raises(Conflict, match="it exists"):
        write_dataset(dataset_dir, events=events, items=items, info={})


def test_a_failure_leaves_nothing_behind(dataset_dir: Path, tmp_path: Path) -> None:
    events, _ = frames(dataset_dir)
    with pytest.raises(BadInput, match="time order"), DatasetWriter(tmp_path / "half", {}) as writer:
        writer.add_events(pl.concat([events, events]))
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


Change = Callable[[pl.DataFrame, pl.DataFrame], tuple[pl.DataFrame, pl.DataFrame]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e, i: (e.reverse(), i), "time order"),
        (lambda e, i: (e.drop("user_id"), i), "no user_id"),
        (lambda e, i: (e.with_columns(mood=pl.lit("good")), i), "unknown mood"),
        (lambda e, i: (e.with_columns(item_id=pl.lit(None, pl.String)), i), "column item_id.*nulls"),
        (lambda e, i: (e.with_columns(price=pl.lit("dear")), i), "price: Int64"),
        (lambda e, i: (e.clear(), i), "no event"),
        (lambda e, i: (e, pl.concat([i, i])), "twice"),
        (lambda e, i: (e, i.with_columns(available_from=pl.lit(None, TIME))), "available_from.*null"),
        (lambda e, i: (e, i.drop("available_from")), "available_from.*null"),
    ],
)
def test_frames_that_break_the_contract_are_refused(
    dataset_dir: Path, tmp_path: Path, change: Change, said: str
) -> None:
    events, items = change(*frames(dataset_dir))
    with pytest.raises(BadInput, match=said):
        write_dataset(tmp_path / "out", events=events, items=items, info={})
    assert not (tmp_path / "out").exists()


def test_time_order_is_checked_across_chunks(dataset_dir: Path, tmp_path: Path) -> None:
    events, items = frames(dataset_dir)
    with pytest.raises(BadInput, match="time order"):
        write_dataset(tmp_path / "out", events=[events[5:], events[:5]], items=items, info={})


def test_no_event_at_all_is_an_error(dataset_dir: Path, tmp_path: Path) -> None:
    _, items = frames(dataset_dir)
    with pytest.raises(BadInput, match="no event"):
        write_dataset(tmp_path / "out", events=[], items=items, info={})


def test_users_and_catalogue_are_kept(dataset_dir: Path, tmp_path: Path) -> None:
    events, items = frames(dataset_dir)
    at = datetime(2024, 11, 11, 1, tzinfo=UTC)
    catalog = pl.DataFrame({"event_id": ["c"], "item_id": ["i0"], "event_time": [at], "kind": ["delist"]})
    users = pl.DataFrame({"user_id": ["u1", "u0"], "attributes": ["{}", None]})
    write_dataset(tmp_path / "out", events=events, items=items, info={}, catalog=catalog, users=users)
    dataset = Dataset.open(tmp_path / "out")
    found = dataset.users()
    assert found is not None
    assert found["user_id"].to_list() == ["u0", "u1"]
    changes = dataset.catalog()
    assert changes is not None
    assert changes.row(0, named=True)["stock"] is None
