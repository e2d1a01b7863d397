from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from recsys.core import BadInput, Internal
from recsys.data import Dataset, import_dataset, simulate
from recsys.data.schema import TIME
from recsys.training import Settings, TrainingConfig, train
from recsys.training.assemble import _checked_until
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


def test_items_that_are_all_listed_later_are_refused(tmp_path):
    """As where available_from is the day of an export."""
    simulate("tiny", 1, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    late = pl.lit(dataset.last_event_us + HOUR_US).cast(TIME)
    dataset.items().with_columns(available_from=late).write_parquet(dataset.root / "items.parquet")
    with pytest.raises(BadInput, match="no item available before"):
        train(dataset.root, tmp_path / "run")


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


def test_a_window_knows_only_what_had_been_learnt_before_it(tmp_path):
    simulate("tiny", 1, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    settings = Settings(training=TrainingConfig(tower_epochs=1, tower_examples_max=100, windows=2))
    first, second = window_starts(dataset, dataset.last_event_us, settings)
    carted_us, learnt_us = first.from_us - HOUR_US, first.from_us  # before the first window, told from its start on
    past = dataset.events(before_us=first.from_us)
    carts = past.unique("user_id", maintain_order=True).with_columns(
        event_id=pl.format("late-{}", "user_id"),
        event_type=pl.lit("cart"),
        event_time=pl.lit(carted_us).cast(TIME),
        known_at=pl.lit(learnt_us).cast(TIME),
    )
    events = pl.concat([dataset.events(), carts], how="diagonal").sort("event_time", maintain_order=True)
    events.write_parquet(dataset.root / "events.parquet")
    made = {"seed": 0, "settings": settings, "work": tmp_path / "work"}
    seen = window_lists(Dataset.open(dataset.root), [first, second], ("purchase",), **made)
    assert [carted_us in lists.histories.time_us for lists in seen] == [False, True]


def test_lists_that_other_windows_taught_to_fuse_are_made_anew(tmp_path):
    """As a folder has them where a run of the same name was trained before, until another time."""
    simulate("tiny", 1, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    settings = Settings(training=TrainingConfig(tower_epochs=1, tower_examples_max=100, windows=3))
    windows = window_starts(dataset, dataset.last_event_us, settings)
    made = {"seed": 0, "settings": settings, "work": tmp_path / "work"}
    window_lists(dataset, windows, ("purchase",), **made)
    found = window_lists(dataset, windows[1:], ("purchase",), **made)
    for lists in tmp_path.glob("work/lists-*"):
        lists.unlink()
    expected = window_lists(dataset, windows[1:], ("purchase",), **made)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.values, theirs.values)


@pytest.mark.parametrize("stray", [datetime(2001, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)])
def test_one_wrong_clock_moves_no_window(tmp_path, stray, capsys):
    settings, found = Settings(), []
    for name in ("right", "wrong"):
        source = tmp_path / name
        an_event_an_hour(30, source)
        if name == "wrong":
            events = pl.read_parquet(source / "events.parquet")
            wrong = events[:1].with_columns(event_time=pl.lit(stray, TIME), event_id=pl.lit("wrong"))
            pl.concat([events, wrong]).sort("event_time").write_parquet(source / "events.parquet")
        import_dataset("canonical", source, tmp_path / f"{name}-data")
        dataset = Dataset.open(tmp_path / f"{name}-data")
        until_us = _checked_until(dataset, None, settings)
        found.append((until_us, window_starts(dataset, until_us, settings)))
    assert found[0] == found[1]
    assert "events_far_from_all_others" in "".join(capsys.readouterr())


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
