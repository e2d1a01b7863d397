import pytest

from recsys.core import Internal
from recsys.data import Dataset
from recsys.training import Settings
from recsys.training.window_workers import prepare
from recsys.training.windows import Window


def test_a_worker_that_fails_stops_the_training(tmp_path, capfd):
    gone = Dataset(tmp_path / "gone", {})
    with pytest.raises(Internal, match="--nproc 1"):
        prepare(gone, [Window(1, 2)], seed=0, settings=Settings(), work=tmp_path / "work", nproc=2)
    assert "no dataset.json" in capfd.readouterr().err
