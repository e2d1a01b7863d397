"""A small shop for the tests of sources, ranking and pipeline: seeded shoppers, real indexes, a real feature store.

80 items in 4 categories; shoppers 0 to 39 have a favourite category and buy some things again. Item 3 is sold out,
item 4 delisted, items 70 to 79 arrived in the last days. Nothing happens at or after UNTIL_US.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.online.memory import MemoryStore
from feature_store.views import VIEW_SET
from recsys.candidates.indexes import build_all
from recsys.core import (
    Candidates,
    Deadline,
    EventBatch,
    EventKind,
    EventType,
    ManualClock,
    Query,
    RunDirectory,
    RunWriter,
    key,
    keys,
)
from recsys.core.events import EVENT_TYPE_BY_LABEL
from recsys.core.items import ItemTable
from recsys.pipeline import Ports

DAY_US = 86_400_000_000
START_US = 1_500_000_000_000_000
UNTIL_US = START_US + 60 * DAY_US
NUM_ITEMS, NUM_USERS = 80, 40
COLOURS = ("red", "green", "blue", "grey")
SOLD_OUT, DELISTED = "item-3", "item-4"
NEVER = Deadline.never()


def items() -> ItemTable:
    ids = [f"item-{i}" for i in range(NUM_ITEMS)]
    arrived = [START_US if i < 70 else UNTIL_US - (i - 69) * DAY_US // 4 for i in range(NUM_ITEMS)]
    return ItemTable.from_table(
        pa.table(
            {
                "item_id": ids,
                "item_key": keys(ids),
                "title": [f"Thing number {i} in {COLOURS[i % 4]}" for i in range(NUM_ITEMS)],
                "category": [f"category-{i % 4}" for i in range(NUM_ITEMS)],
                "price": [100 * (i + 1) for i in range(NUM_ITEMS)],
                "available_from": arrived,
            }
        )
    )


def events(seed: int = 0, num_events: int = 3_000) -> pl.DataFrame:
    """A dataset's `events`, sorted by time."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, NUM_USERS, num_events)
    item = np.where(rng.random(num_events) < 0.7, 4 * rng.integers(0, 17, num_events) + user % 4, 0)
    item = np.where(item == 0, rng.integers(0, 70, num_events), item)
    kind = rng.choice(["view", "cart", "purchase"], num_events, p=[0.6, 0.2, 0.2])
    time_us = np.sort(START_US + rng.integers(0, 60 * DAY_US - 1, num_events))
    frame = pl.DataFrame(
        {
            "event_id": [f"e{i}" for i in range(num_events)],
            "user_id": [f"user-{u}" for u in user],
            "item_id": [f"item-{i}" for i in item],
            "event_type": kind,
            "event_time": time_us,
        }
    )
    return frame.with_columns(pl.col("event_time").cast(pl.Datetime("us", "UTC")))


def store(log: pl.DataFrame | None = None) -> MemoryStore:
    """The shop's features, item 3 sold out and item 4 delisted."""
    log = events() if log is None else log
    memory = MemoryStore()
    memory.apply(
        EventBatch.from_columns(
            {
                "event_id": log["event_id"].to_list(),
                "kind": np.full(len(log), EventKind.ACTION, np.int8),
                "event_type": np.array([EVENT_TYPE_BY_LABEL[t] for t in log["event_type"]], np.int8),
                "event_time": log["event_time"].dt.epoch("us").to_numpy(),
                "user_id": log["user_id"].to_list(),
                "item_id": log["item_id"].to_list(),
            }
        )
    )
    memory.apply(
        EventBatch.from_columns(
            {
                "event_id": ["stock", "delist"],
                "kind": np.array([EventKind.STOCK, EventKind.ITEM], np.int8),
                "event_time": np.full(2, UNTIL_US - 1),
                "item_id": [SOLD_OUT, DELISTED],
                "stock": pa.array([0, None], pa.int64()),
                "listed": pa.array([None, False], pa.bool_()),
            }
        )
    )
    return memory


def write_run(
    out: Path,
    *,
    feature_views: str = VIEW_SET,
    blend_weight: float = 0.5,
    more: Callable[[RunWriter], None] | None = None,
    replace: bool = False,
) -> RunDirectory:
    """A run with the light indexes, a reranker folder that holds its blend weight only, and what `more` writes."""
    fields = {
        "run_id": "shop", "parent": None, "dataset_hash": "", "until": UNTIL_US, "seed": 0, "config": {},
        "versions": {}, "commit": "test", "feature_views": feature_views, "measures": {}, "rerankers": ["1"],
    }  # fmt: skip
    with RunWriter(out, fields, replace=replace) as run:
        items().write(run.path("items.parquet"))
        for name, table in build_all(events(), items(), UNTIL_US).items():
            pq.write_table(table, run.path(f"index/{name}.parquet"))
        run.path("reranker/1/double11.json").write_text(
            json.dumps({"blend_weight": blend_weight, "blend_weight_new_only": blend_weight / 2})
        )
        if more is not None:
            more(run)
    return RunDirectory.open(out)


def query(user: int | str = 1, **fields) -> Query:
    name = user if isinstance(user, str) else f"user-{user}"
    return Query(**{"user_id": name, "as_of_us": UNTIL_US, "request_id": "r", "limit": 10, **fields})


def ports(features: MemoryStore, **replaced) -> Ports:
    return Ports(**{"features": features, "clock": ManualClock(UNTIL_US), "rng": np.random.default_rng(0), **replaced})


def purchases(user_id: str) -> set[int]:
    log = events().filter((pl.col("user_id") == user_id) & (pl.col("event_type") == EventType.PURCHASE.label))
    return {key(i) for i in log["item_id"]}


def acted_on(user_id: str) -> set[int]:
    return {key(i) for i in events().filter(pl.col("user_id") == user_id)["item_id"]}


def candidates(item_key, score=None, name: str = "s") -> Candidates:
    item_key = np.asarray(item_key, np.int64)
    score = np.arange(len(item_key), 0, -1) if score is None else score
    return Candidates.from_source(name, item_key, np.asarray(score, np.float32))


@pytest.fixture(name="shop", scope="session")
def shop_fixture() -> ModuleType:
    """The module of this fixture."""
    return sys.modules[__name__]


@pytest.fixture(name="store", scope="session")
def store_fixture() -> MemoryStore:
    """`store()`, folded once."""
    return store()


@pytest.fixture(name="run", scope="session")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """`write_run`, once."""
    return write_run(tmp_path_factory.mktemp("shop") / "run")
