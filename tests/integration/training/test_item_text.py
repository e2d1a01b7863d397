"""An item that nobody has touched is found by what it is called: events and titles, training, index, source."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from feature_store import UserFeatures
from recsys.candidates.ann import LocalAnnSource
from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import Deadline, EventType, Query, key, keys
from recsys.core.items import ItemTable
from recsys.models.config import TowerConfig
from recsys.training import TrainingConfig
from recsys.training.tower_trainer import train_tower

START = datetime(2026, 1, 1, tzinfo=UTC)
NUM_USERS, NUM_BOUGHT = 60, 6
KINDS = {
    "kitchen": [f"{colour} ceramic {it}" for colour in ("Red", "Blue", "White", "Black") for it in ("Mug", "Bowl")],
    "cables": [f"{size} m usb {it}" for size in (1, 2, 3, 5) for it in ("charger", "cable")],
    "陶瓷": [f"{colour}陶瓷{it}" for colour in ("红色", "蓝色", "白色", "黑色") for it in ("马克杯", "茶杯")],
}
NEW = {"kitchen": "Green ceramic mug", "cables": "4 m usb charger", "陶瓷": "绿色陶瓷马克杯"}
TITLES = {f"{kind}-{n}": title for kind, titles in KINDS.items() for n, title in enumerate(titles)}
TITLES |= {f"{kind}-new": title for kind, title in NEW.items()}


def purchases():
    """Each shopper buys things of one kind only, in an order of their own."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(NUM_USERS):
        kind = list(KINDS)[user % len(KINDS)]
        for step, item in enumerate(rng.permutation(len(KINDS[kind]))[:NUM_BOUGHT]):
            rows.append((f"u{user}", f"{kind}-{item}", START + timedelta(days=step, minutes=user)))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "event_time"], orient="row")
    return frame.with_columns(event_type=pl.lit("purchase")).sort("event_time")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Towers trained on the purchases, and their index with every item."""
    ids = list(TITLES)
    items = ItemTable.from_table(pa.table({"item_id": ids, "item_key": keys(ids), "title": list(TITLES.values())}))
    config = TrainingConfig(tower_epochs=8, tower_batch=64)
    model = TowerConfig(dim=16, heads=2, history_items_max=10)
    tower = train_tower(purchases(), items, config=config, model=model, seed=0, work=tmp_path_factory.mktemp("work"))
    return LocalAnnSource(tower, LiveIndex(AnnIndex.build(*tower.item_vectors())))


@pytest.mark.parametrize(("user", "kind"), list(enumerate(KINDS)))
async def test_an_untouched_item_is_found_by_who_bought_its_like_and_by_nobody_else(source, user, kind):
    rows = purchases().filter(pl.col("user_id") == f"u{user}")
    as_of_us = int((START + timedelta(days=30)).timestamp() * 1e6)
    features = replace(
        UserFeatures.not_found(f"u{user}", as_of_us),
        recent_item_key=keys(rows["item_id"]),
        recent_event_type=np.full(len(rows), EventType.PURCHASE, np.int8),
        recent_time_us=rows["event_time"].dt.epoch("us").to_numpy(),
    )
    query = Query(user_id=f"u{user}", as_of_us=as_of_us)
    found = await source.retrieve(query, features, len(KINDS[kind]) + 1, Deadline.never())
    new = {key(f"{k}-new"): k for k in KINDS}
    assert [new[k] for k in found.item_key.tolist() if k in new] == [kind]
