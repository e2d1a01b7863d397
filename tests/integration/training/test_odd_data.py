"""Legal data that no public log looks like goes the whole way: import, train, lists for distillation, slates."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_store.online.memory import MemoryStore
from llm_reranker.lists import read
from recsys.core import Deadline, ManualClock, Query
from recsys.data import Dataset, import_dataset
from recsys.data.schema import TIME
from recsys.models.config import RankerConfig, TowerConfig
from recsys.pipeline import Ports, build
from recsys.training import Settings, TrainingConfig, rerank_lists, train

START = datetime(2024, 3, 1, tzinfo=UTC)
UNTIL_US = int((START + timedelta(days=30)).timestamp()) * 1_000_000
SETTINGS = Settings(
    training=TrainingConfig(windows=2, tower_epochs=1, ranker_epochs=1, ranker_steps_min=2),
    tower=TowerConfig(dim=16, heads=2, history_items_max=10),
    ranker=RankerConfig(dim=4, hidden=8),
)
ODD_IDS = ["tea cup", "a\tb", "--json", "../../etc", '"q"', "<|im_end|>", "\U0001f600", "x" * 256]
ODD_IDS += [f"双十一 手机 {n}" for n in range(12)]


def views_of_nameless_items(source: Path) -> None:
    """Only views, items without any text, ids of every kind, newcomers with one event, events at midnight."""
    rng = np.random.default_rng(0)
    rows = [
        (f"用户 {u}", START + timedelta(seconds=int(s))) for u in range(40) for s in rng.integers(0, 40 * 86_400, 9)
    ]
    rows += [(f"once {u}", START + timedelta(days=u)) for u in range(40)]
    events = pl.DataFrame(rows, schema={"user_id": pl.String, "event_time": TIME}, orient="row").sort("event_time")
    ids = rng.choice(ODD_IDS, len(events))
    events = events.with_columns(
        event_id=pl.int_range(pl.len()).cast(pl.String), event_type=pl.lit("view"), item_id=ids
    )
    events.write_parquet(source / "events.parquet")
    pl.DataFrame({"item_id": ODD_IDS}).write_parquet(source / "items.parquet")


def five_items_by_day(source: Path) -> None:
    """An archive of days; repeated basket lines; five items, one that comes after the cut and one after the log."""
    rng = np.random.default_rng(1)
    for day in range(40):
        buyers = np.repeat(rng.choice(40, 12, replace=False), 3)  # three lines a basket, the same item twice at times
        frame = pl.DataFrame(
            {
                "event_id": [f"{day}-{n}" for n in range(len(buyers))],
                "user_id": [f"u{b}" for b in buyers],
                "item_id": rng.choice(list("abcde") if day < 35 else ["a", "late"], len(buyers)),
                "event_type": "purchase",
            }
        ).with_columns(event_time=pl.lit(START + timedelta(days=day), TIME))
        folder = source / "events" / f"day={START + timedelta(days=day):%Y-%m-%d}"
        folder.mkdir(parents=True)
        frame.write_parquet(folder / "0-0-35.parquet")
    days = [0, 0, 0, 0, 0, 35, 99]
    listed = pl.Series([START + timedelta(days=d) for d in days], dtype=TIME)
    items = pl.DataFrame({"item_id": [*"abcde", "late", "never"], "available_from": listed})
    items.write_parquet(source / "items.parquet")


@pytest.mark.parametrize("make", [views_of_nameless_items, five_items_by_day])
async def test_it_goes_the_whole_way(make, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    report = import_dataset("canonical", source, tmp_path / "data")
    assert report.as_json()["rejected"] == {}
    dataset = Dataset.open(tmp_path / "data")
    run = await asyncio.to_thread(train, dataset.root, tmp_path / "run", until_us=UNTIL_US, settings=SETTINGS)
    lists = read(await asyncio.to_thread(rerank_lists.make, dataset.root, run))
    assert lists.label.any()
    store = MemoryStore()
    for batch in dataset.event_batches(before_us=UNTIL_US):
        store.apply(batch)
    cascade = build("rank", run, Ports(features=store, clock=ManualClock(UNTIL_US), rng=np.random.default_rng(0)))
    known = set(dataset.item_table(before_us=UNTIL_US).column("item_id"))
    for user_id in [*dataset.events()["user_id"].unique().sort().head(20), "nobody"]:
        slate = await cascade.recommend(Query(user_id=user_id, as_of_us=UNTIL_US), Deadline.never())
        shown = [item.item_id for item in slate.items]
        assert (slate.tier.label, slate.fallbacks) == ("rank", ())
        assert len(shown) == len(set(shown)) == min(10, len(known))
        assert set(shown) <= known
    cascade.close()
