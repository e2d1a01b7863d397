"""Trains the towers to tell which item, of all, a user acted on next.

Softmax over the batch's own items and as many uniform ones, each logit less the log of its chance to be drawn, so that
popular items are not punished for being popular.

Shape legend: B examples, N items scored against (B positives + uniform negatives), D dimension.
Source: Yi et al. 2019 (logQ correction); Yang et al. 2020 (mixed negative sampling).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core.items import ItemTable
from recsys.core.progress import bar
from recsys.models.config import TowerConfig
from recsys.models.embeddings import dense_parameters, fuse_optimizer
from recsys.models.tower import ItemRows, Tower, TowerNet
from recsys.training.config import TrainingConfig
from recsys.training.loop import LossGuard, seed_torch
from recsys.training.tower_data import Actions

_UNKNOWN_SHARE = 0.05  # of items trained as "unknown", so that row 0 stands for a newcomer


def train_tower(
    events: pl.DataFrame, items: ItemTable, *, config: TrainingConfig, model: TowerConfig, seed: int, work: Path
) -> Tower:
    """Towers trained on `events`. work: where a batch with a broken loss is left."""
    seed_torch(seed, config.threads)
    rng = np.random.default_rng(seed)
    actions = Actions.from_events(events)
    rows, num_rows = ItemRows.build(items, np.unique(actions.item_key))
    net = TowerNet(num_rows, model)
    tower = Tower(net, rows, model)
    examples = np.flatnonzero(
        (actions.history_stop > actions.history_start) & np.isin(actions.item_key, items.item_key)
    )
    if not len(examples):
        net.eval()
        return tower  # nobody came back yet: vectors of categories and brands only
    examples = examples[np.argsort(actions.time_us[examples], kind="stable")][-config.tower_examples_max :]
    fuse_optimizer(net.tables, config.tower_table_learning_rate)
    optimizer = torch.optim.Adam(dense_parameters(net, [net.tables]), lr=config.tower_learning_rate)
    step_of = _Step(tower, actions, rng)
    guard = LossGuard("tower", work)
    num_batches = -(-len(examples) // config.tower_batch)
    with bar(total=config.tower_epochs * num_batches, what="tower", unit="batch") as progress:
        for _ in range(config.tower_epochs):
            for batch in np.array_split(rng.permutation(examples), num_batches):
                loss, saved = step_of(batch)
                value = guard.check(loss, int(progress.n), saved)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                progress.set_postfix(loss=f"{value:.3f}", refresh=False)
                progress.update()
    net.eval()
    return tower


class _Step:
    """Loss of one batch of action rows."""

    def __init__(self, tower: Tower, actions: Actions, rng: np.random.Generator) -> None:
        self.tower, self.actions, self.rng = tower, actions, rng
        keys, counts = np.unique(actions.item_key, return_counts=True)
        self.catalogue = tower.items.vocabulary.keys
        chance = np.zeros(len(self.catalogue) + 1)
        chance[tower.items.vocabulary.rows(keys)] = counts / counts.sum()
        self.chance = chance
        self.weight = actions.weights()

    def __call__(self, batch: npt.NDArray[np.int64]) -> tuple[Tensor, dict[str, Tensor]]:
        net, config = self.tower.net, self.tower.config
        histories = self.actions.histories(batch, config.history_items_max)
        uniform = self.rng.choice(self.catalogue, size=len(batch))
        target = np.concatenate([self.actions.item_key[batch], uniform])
        keys = np.concatenate([histories.item_key, target])
        hidden = self.rng.random(len(keys)) < _UNKNOWN_SHARE
        ids = self.tower.items.lookup(keys, np.array([*histories.lengths, len(target)]), hidden)
        embedded_VD = net.embed(ids)
        num_history = len(histories.item_key)
        user_BD = net.users(
            embedded_VD[:num_history],
            torch.from_numpy(histories.event_type),
            torch.from_numpy(histories.age_bucket()),
            torch.from_numpy(histories.lengths),
        )
        item_ND = net.items(embedded_VD[num_history:])
        place = self.tower.items.vocabulary.rows(target)
        expected = len(batch) * self.chance[place] + len(batch) / len(self.catalogue)
        logit_BN = user_BD @ item_ND.T / config.temperature - torch.from_numpy(np.log(expected)).float()
        same_BN = torch.from_numpy(place[: len(batch), None] == place[None, :])
        same_BN.fill_diagonal_(False)  # an item is no negative of itself
        loss_B = F.cross_entropy(logit_BN.masked_fill(same_BN, -1e9), torch.arange(len(batch)), reduction="none")
        weight_B = torch.from_numpy(self.weight[batch])
        saved = {"rows": torch.from_numpy(batch), "target": torch.from_numpy(target), "logit": logit_BN.detach()}
        return (loss_B * weight_B).sum() / weight_B.sum(), saved
