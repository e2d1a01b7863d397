from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.core import RunDirectory, RunWriter, keys
from recsys.core.items import ItemTable
from recsys.models.config import RankerConfig, TowerConfig
from recsys.models.embeddings import Vocabulary
from recsys.models.ranker import Calibration, Head, Ranker, RankerNet
from recsys.models.tower import ItemRows, Tower, TowerNet

NAMES = ("own_history_score", "covisit_score", "item_price")
_FIELDS = {
    "run_id": "r1", "parent": None, "dataset_hash": "", "until": 0, "seed": 0, "config": {}, "versions": {},
    "commit": "", "feature_views": "v", "measures": {},
}  # fmt: skip


@pytest.fixture
def items() -> ItemTable:
    ids = [f"i{n}" for n in range(20)]
    category = [None if n % 5 == 0 else f"c{n % 3}" for n in range(20)]
    return ItemTable.from_table(pa.table({"item_id": ids, "item_key": keys(ids), "category": category}))


@pytest.fixture
def tower(items: ItemTable) -> Tower:
    torch.manual_seed(0)
    config = TowerConfig(dim=8, heads=2, history_items_max=4)
    rows, num_rows = ItemRows.build(items, items.item_key[:15])
    net = TowerNet(num_rows, config)
    return Tower(net.eval(), rows, config)


@pytest.fixture
def ranker(items: ItemTable) -> Ranker:
    torch.manual_seed(0)
    config = RankerConfig(dim=4, hidden=8)
    net = RankerNet(len(NAMES), len(items) + 1, config, num_others=1)
    net.scaling.fit(np.random.default_rng(0).normal(size=(50, len(NAMES))).astype(np.float32))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    heads = (Head("purchase", Calibration(0.5, -1.0)), Head("view", Calibration(2.0, 1.0)))
    return Ranker(net.eval(), NAMES, Vocabulary(items.item_key), config, heads=heads)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Tower | Ranker], RunDirectory]:
    def write(model: Tower | Ranker) -> RunDirectory:
        with RunWriter(tmp_path / "run", _FIELDS) as run:
            model.save(run.path("models/x").parent)
        return RunDirectory.open(tmp_path / "run")

    return write
