"""A small simulated shop and a run trained on it, once per session."""

import pytest

from recsys.data import Dataset, simulate
from recsys.training import Settings, TrainingConfig, train


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """The dataset directory of a tiny simulated world."""
    out = tmp_path_factory.mktemp("serving") / "shop"
    simulate("tiny", 7, out)
    return out


@pytest.fixture(scope="session")
def run(shop):
    """A run trained quickly: real files and models, small effort."""
    training = TrainingConfig(
        windows=2, queries_per_window_max=60, candidates_max=100, tower_epochs=1, tower_examples_max=2_000,
        ranker_epochs=1, threads=1,
    )  # fmt: skip
    return train(shop, shop.parent / "run", seed=1, settings=Settings(training=training))


@pytest.fixture(scope="session")
def dataset(shop):
    """The opened dataset."""
    return Dataset.open(shop)
