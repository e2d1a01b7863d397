import pytest

from recsys.core import BadInput, Internal
from recsys.data import Dataset, simulate
from recsys.training import Settings, TrainingConfig
from recsys.training.lists import window_lists
from recsys.training.window_workers import prepare
from recsys.training.windows import Window


def test_a_worker_that_fails_stops_the_training(tmp_path, capfd):
    gone = Dataset(tmp_path / "gone", {})
    with pytest.raises(Internal, match="--nproc 1"):
        prepare(gone, [Window(1, 2)], seed=0, settings=Settings(), work=tmp_path / "work", nproc=2)
    assert "no dataset.json" in capfd.readouterr().err


def test_windows_nobody_came_back_in_are_refused(tmp_path):
    simulate("tiny", 1, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    settings = Settings(training=TrainingConfig(tower_epochs=1, tower_examples_max=100))
    start_us = dataset.first_event_us + 1
    with pytest.raises(BadInput, match="come back"):
        window_lists(dataset, [Window(start_us, start_us + 1)], seed=0, settings=settings, work=tmp_path / "work")
