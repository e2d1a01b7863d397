"""Compaction on a real broker keeps an item's price and its stock; of plain item keys it keeps the last record only."""

import os
import time
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest

from recsys.core import EventBatch, EventKind, keys
from recsys.core.items import ItemTable
from recsys.core.murmur2 import partition_of
from recsys.ranking.live import LiveCatalogue
from streaming.codec import decode_events, encode_events, owner_of
from streaming.config import StreamingConfig, Topics
from streaming.log import open_log
from streaming.log.base import read_all
from streaming.produce import produce

ITEMS = [f"item-{i}" for i in range(40)]
T = 1_700_000_000_000_000
COMPACTED_S = 240


def changes(kind, number, at):
    """One change of every item."""
    said = pa.array([number] * len(ITEMS), pa.int64())
    return EventBatch.from_columns(
        {
            "event_id": [f"{kind.name}-{at}-{i}" for i in ITEMS],
            "kind": np.full(len(ITEMS), kind, np.int8),
            "event_time": np.full(len(ITEMS), T + at, np.int64),
            "item_id": ITEMS,
            **({"price": said} if kind is EventKind.PRICE else {"stock": said}),
        }
    )


# The last price comes long before the last stock; the last two rounds lie in segments that no compaction has to keep.
ROUNDS = [
    changes(EventKind.PRICE, 700, 0),
    changes(EventKind.STOCK, 9, 1),
    changes(EventKind.PRICE, 500, 2),
    *[changes(EventKind.STOCK, n, 10 + n) for n in range(20, -1, -1)],
    *[changes(EventKind.STOCK, 0, 100 + n) for n in range(3)],
]


def live_after(log, topic):
    live = LiveCatalogue(ItemTable.from_table(pa.table({"item_id": ITEMS, "item_key": keys(ITEMS)})))
    records = 0
    for batch in read_all(log, topic):
        assert {partition_of(owner_of(k), 4) for k in batch.keys} <= {batch.partition}
        live.apply(decode_events(batch.values, batch.headers).batch)
        records += len(batch)
    return live, records


def until_compacted(log, topic, tick):
    """The state that a reader from the beginning makes once few records are left; segments close at `tick`."""
    deadline_s = time.monotonic() + COMPACTED_S
    while True:
        tick()
        live, records = live_after(log, topic)
        if records < 8 * len(ITEMS):
            return live
        assert time.monotonic() < deadline_s, f"{records} records are left"
        time.sleep(0.3)


if os.environ.get("DOUBLE11_KAFKA_HOME") or os.environ.get("DOUBLE11_KAFKA"):

    @pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_price_and_stock_survive_compaction_unless_keys_are_plain_items(kafka, kafka_config, plain):
        config, _ = kafka_config("confluent", catalog_history_s=1)
        topics = config.get(Topics)
        with open_log(f"kafka://{kafka}", config) as log:
            log.create_topics(StreamingConfig(partitions=4).partitions_by_topic(topics))
            producer = log.producer()

            def send(batch):
                if not plain:
                    produce([batch], log, topics=topics)
                    return
                for _, key, value in encode_events(batch):
                    producer.send(topics.catalog, owner_of(key), value)
                producer.flush()

            def tick():
                """A record of nobody in each partition, so that segments in which time is up are closed."""
                for partition in range(4):
                    nobody = next(i for i in iter(lambda: uuid4().hex.encode(), b"") if partition_of(i, 4) == partition)
                    producer.send(topics.catalog, nobody, b"\xff")
                producer.flush()

            for batch in ROUNDS:
                send(batch)
            live = until_compacted(log, topics.catalog, tick)
            producer.close()
        assert not live.available(keys(ITEMS)).any()
        assert set(live.price(keys(ITEMS)).tolist()) == ({-1} if plain else {500})
