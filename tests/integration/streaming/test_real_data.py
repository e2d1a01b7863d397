"""Zero skew on real data: Complete Journey, streamed with disorder and repeats, equals the dataset folded offline."""

from itertools import pairwise

import numpy as np

from feature_store.online import MemoryStore
from recsys.data import Dataset, import_dataset
from streaming.config import JobConfig


def test_streamed_features_equal_the_offline_fold_bit_for_bit(room, tmp_path):
    import_dataset("complete-journey", None, tmp_path / "data", options={"households": "10"})
    dataset, offline, rng = Dataset.open(tmp_path / "data"), MemoryStore(), np.random.default_rng(4)
    room.config = JobConfig(batch_records_max=1_000)
    repeated = 0
    for batch in dataset.event_batches():
        offline.apply(batch)
        # Disorder within three hours, and one event in twenty twice: what a network does.
        late_us = rng.integers(0, 3 * 3_600_000_000, len(batch))
        arrival = np.argsort(batch.numpy("event_time") + late_us, kind="stable")
        twice = np.sort(np.concatenate([np.arange(len(batch)), rng.integers(0, len(batch), len(batch) // 20)]))
        repeated += len(twice) - len(batch)
        room.send(batch.take(arrival[twice]))
    report = room.ingest()
    assert report.events["applied"] + report.events["duplicate"] == sum(map(len, dataset.event_batches())) + repeated
    users = dataset.events()["user_id"].unique().sort().to_list()
    items = dataset.items()["item_id"].to_list()
    assert room.store.load("user", users) == offline.load("user", users)
    for a, b in pairwise(range(0, len(items) + 5_000, 5_000)):
        assert room.store.load("item", items[a:b]) == offline.load("item", items[a:b])
    # A catalogue change that comes twice is applied twice: its reducers do not change by that.
    assert 0 < report.events["duplicate"] < repeated
