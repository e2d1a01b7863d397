"""What an index is tuned on in training: the vectors of users, as they were before their actions."""

import numpy as np
import polars as pl
from pipeline_world import events, items

from recsys.models.config import TowerConfig
from recsys.models.tower import ItemRows, Tower, TowerNet
from recsys.training.base_run import user_vectors
from recsys.training.settings import Settings


def test_queries_are_user_vectors_and_the_same_every_time():
    rows, num_rows = ItemRows.build(items(), items().item_key)
    tower = Tower(TowerNet(num_rows, TowerConfig()), rows, TowerConfig())
    first, second = [user_vectors(tower, events(), 50) for _ in range(2)]
    assert first.shape == (50, 64)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(first, second)
    assert user_vectors(tower, events(), 10**9).shape[0] == len(events()) - events()["user_id"].n_unique()
    assert user_vectors(tower, events().filter(pl.lit(False)), 50) is None


def test_a_manifest_without_index_settings_has_the_defaults():
    sections = Settings().as_dict()
    del sections["models.index"], sections["candidates.covisit"]
    assert Settings.from_dict(sections) == Settings()
