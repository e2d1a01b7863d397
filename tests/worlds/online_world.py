"""A small run, a log with labelled samples and a store with their users: what online training needs."""

import numpy as np
from double11.v1.sample_pb2 import Sample

from feature_store.online.memory import MemoryStore
from recsys.core import EventType
from recsys.data import Dataset, simulate
from recsys.models.config import RankerConfig, TowerConfig
from recsys.training import Settings, TrainingConfig, train
from streaming.log import open_log
from streaming.topics import StreamingConfig, Topics

TOPICS = Topics()
SETTINGS = Settings(
    training=TrainingConfig(
        windows=2, queries_per_window_max=20, tower_epochs=1, tower_examples_max=1_000, ranker_epochs=1,
        ranker_steps_min=1,
    ),
    tower=TowerConfig(dim=16, heads=2, history_items_max=10),
    ranker=RankerConfig(dim=4, hidden=8),
)  # fmt: skip


def make_run(folder):
    """A run on half of a simulated world, and the world."""
    simulate("tiny", 0, folder / "data")
    dataset = Dataset.open(folder / "data")
    until_us = dataset.first_event_us + (dataset.last_event_us - dataset.first_event_us) // 2
    return train(dataset.root, folder / "run", until_us=until_us, settings=SETTINGS), dataset


def make_log(url):
    """The topics, empty."""
    with open_log(url) as log:
        log.create_topics(StreamingConfig(partitions=2).partitions_by_topic(TOPICS))


def make_store(dataset, until_us):
    """A store in memory that knows the events before a time."""
    store = MemoryStore()
    for batch in dataset.event_batches(before_us=until_us):
        store.apply(batch)
    return store


def samples(dataset, run, count, seed=0):
    """Impressions after the run's end, half of them acted on."""
    rng = np.random.default_rng(seed)
    events = dataset.events(before_us=run.until_us)
    users, items = events["user_id"].unique().sort(), events["item_id"].unique().sort()
    for number in range(count):
        acted = number % 2 == 0
        yield Sample(
            sample_id=f"s{seed}-{number}",
            user_id=users[int(rng.integers(len(users)))],
            item_id=items[int(rng.integers(len(items)) ** 2 // len(items))],
            event_time_us=run.until_us + number,
            position=1,
            action_types=[int(EventType.PURCHASE)] if acted else [],
        )


def send(url, some):
    """Append samples to the log."""
    with open_log(url) as log:
        producer = log.producer()
        for sample in some:
            producer.send(TOPICS.samples, sample.user_id.encode(), sample.SerializeToString())
        producer.close()
