from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from recsys.core import BadInput, Internal
from recsys.data import Dataset, import_dataset, simulate
from recsys.data.schema import TIME
from recsys.training import Settings, TrainingConfig
from recsys.training.base_run import window_run
from recsys.training.launch import launch
from recsys.training.lists import window_lists, window_starts
from recsys.training.windows import HOUR_US, Window


def test_a_process_that_fails_stops_the_training(tmp_path, capfd):
    with pytest.raises(Internal, match="--nproc 1"):
        launch(tmp_path / "gone", tmp_path / "run", until_us=1, seed=0, settings=Settings(), replace=False, nproc=1)
    assert "no dataset.json" in capfd.readouterr().err


def test_windows_nobody_came_back_in_are_refused(tmp_path):
    simulate("tiny", 1, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    settings = Settings(training=TrainingConfig(tower_epochs=1, tower_examples_max=100))
    start_us = dataset.first_event_us + 1
    with pytest.raises(BadInput, match="come back"):
        window_lists(
            dataset, [Window(start_us, start_us + 1)], ("purchase",), seed=0, settings=settings, work=tmp_path / "work"
        )


def test_lists_made_ahead_of_the_last_window_are_those_made_at_the_end(tmp_path):
    simulate("tiny", 1, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    settings = Settings(training=TrainingConfig(tower_epochs=1, tower_examples_max=100, windows=3))
    windows = window_starts(dataset, dataset.last_event_us, settings)
    made = {"seed": 0, "settings": settings, "work": tmp_path / "ahead"}
    window_lists(dataset, windows, ("purchase",), **made, ahead=True)
    assert not list(tmp_path.glob("ahead/lists-*"))  # no run is there
    for window in windows[:2]:
        window_run(dataset, window.from_us, **made)
    window_lists(dataset, windows, ("purchase",), **made, ahead=True)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("ahead/lists-*")}
    assert sorted(path.name.split("-")[2] for path in kept) == [str(w.from_us) for w in windows[:2]]
    found = window_lists(dataset, windows, ("purchase",), **made)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    expected = window_lists(dataset, windows, ("purchase",), **made | {"work": tmp_path / "at-the-end"})
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.item_key, theirs.item_key)
        np.testing.assert_array_equal(ours.values, theirs.values)
        np.testing.assert_array_equal(ours.label, theirs.label)


def an_event_an_hour(users, source):
    """Every user's 50 last events, one an hour, as where only their order is known."""
    source.mkdir()
    rows = [
        (f"u{u}", f"i{(u + h) % 7}", datetime(2018, 1, 1 + h // 24, h % 24, tzinfo=UTC))
        for h in range(50)
        for u in range(users)
    ]
    events = pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String, "event_time": TIME}, orient="row")
    events.with_columns(event_id=pl.int_range(pl.len()).cast(pl.String), event_type=pl.lit("purchase")).write_parquet(
        source / "events.parquet"
    )
    pl.DataFrame({"item_id": [f"i{n}" for n in range(7)]}).write_parquet(source / "items.parquet")


@pytest.mark.parametrize(("users", "hours"), [(30, 1), (10, 4.9)])
def test_windows_of_hours_are_as_short_as_have_users_enough(tmp_path, users, hours):
    an_event_an_hour(users, tmp_path / "source")
    import_dataset("canonical", tmp_path / "source", tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    settings = Settings(training=TrainingConfig(queries_per_window_max=20))
    until_us = dataset.last_event_us
    windows = window_starts(dataset, until_us, settings)
    assert [w.to_us for w in windows] == pytest.approx([until_us - n * hours * HOUR_US for n in range(4, -1, -1)])
    assert windows[0].to_us - windows[0].from_us == pytest.approx(hours * HOUR_US)
