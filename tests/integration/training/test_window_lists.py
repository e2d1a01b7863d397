import pytest

from recsys.core import BadInput, Internal
from recsys.data import Dataset, simulate
from recsys.training import Settings, TrainingConfig
from recsys.training.launch import launch
from recsys.training.lists import window_lists
from recsys.training.windows import Window


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
