"""Trains the towers to tell which item, of all, a user acted on next.

Ranks share each batch: a rank encodes its examples and its items, and scores its examples against the items of all.

Shape legend: B examples of a batch.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from recsys.core.items import ItemTable
from recsys.core.progress import bar
from recsys.models.config import TowerConfig
from recsys.models.id_map import IdMap
from recsys.models.tower import ItemRows, Tower, TowerNet
from recsys.training.checkpoint import Checkpoints
from recsys.training.config import TrainingConfig
from recsys.training.item_text import item_text
from recsys.training.loop import LossGuard, Schedule, seed_torch
from recsys.training.ranks import Ranks, alone
from recsys.training.sharded import Sharded
from recsys.training.tower_data import Actions
from recsys.training.tower_step import Examples, TowerStep

CHECKPOINTS = "tower-checkpoint-"  # folders in the working folder; what is in one is of no use once the run is whole


def train_tower(
    events: pl.DataFrame,
    items: ItemTable,
    *,
    config: TrainingConfig,
    model: TowerConfig,
    seed: int,
    work: Path,
    ranks: Ranks | None = None,
    guard: LossGuard | None = None,
) -> Tower:
    """Towers trained on `events`, by all `ranks` or this process alone; whole on rank 0, untrained on the others.

    work: where a batch with a broken loss is left, and checkpoints, from which the same call goes on.
    guard: watches the loss of every step.
    """
    with nullcontext(ranks) if ranks is not None else alone(config.device) as group:
        guard = guard or LossGuard("tower", work, group.rank)
        with group.own_cores():
            return _train(events, items, group, guard, config=config, model=model, seed=seed, work=work)


def _train(
    events: pl.DataFrame,
    items: ItemTable,
    ranks: Ranks,
    guard: LossGuard,
    *,
    config: TrainingConfig,
    model: TowerConfig,
    seed: int,
    work: Path,
) -> Tower:
    seed_torch(seed, config.threads)
    rng = np.random.default_rng(seed)
    actions = Actions.from_events(events)
    encoder, text = item_text(items, model, work, ranks)
    rows, num_rows = ItemRows.build(
        items, np.unique(actions.item_key), _id_map(actions, model), text=text, price=model.price
    )
    examples = np.flatnonzero(
        (actions.history_stop > actions.history_start) & np.isin(actions.item_key, items.item_key)
    )
    examples = examples[np.argsort(actions.time_us[examples], kind="stable")][-config.tower_examples_max :]
    sharded = Sharded(
        TowerNet(num_rows, model, "meta", **rows.sizes),
        ranks,
        table_learning_rate=config.tower_table_learning_rate,
        seed=seed,
        batch_size=-(-config.tower_batch // ranks.size) + 1,
        sharding=config.sharding,
    )
    optimizer = torch.optim.Adam(sharded.dense, lr=config.tower_learning_rate)
    step_of = TowerStep(sharded.net, rows, model, actions.chance(rows.vocabulary), rng, ranks)
    weight = actions.weights(config.tower_half_life_days)
    # nobody came back yet: no example, no batch, vectors of categories and brands only
    schedule = Schedule(rng, examples, epochs=config.tower_epochs, batch=config.tower_batch)
    facts = _facts(actions, rows, config, model, seed)
    checkpoints = Checkpoints(work / f"{CHECKPOINTS}{facts['data']}", facts, ranks)
    if config.checkpoint_steps and (place := checkpoints.load(sharded.state(optimizer))):
        schedule.go_to(place)
    with bar(total=schedule.steps, initial=schedule.step, what="tower", unit="batch") as progress:
        batches = (  # each drawn during the step before, whose place a checkpoint has
            (step, step_of.prepare(_examples(actions, batch, weight, model.history_items_max, ranks)), schedule.place())
            for step, batch in schedule
        )
        ahead = next(batches, None)
        while ahead is not None:
            step, made, place = ahead
            loss, saved = step_of(made)
            value = guard.check(ranks.sum(loss.detach().clone()), step, saved)
            ahead = next(batches, None)
            if ahead is not None:
                sharded.send(ahead[1].items.ids)
            optimizer.zero_grad()
            sharded.backward(loss)
            optimizer.step()
            progress.set_postfix(loss=f"{value:.3f}", refresh=False)
            progress.update()
            if config.checkpoint_steps and (step + 1) % config.checkpoint_steps == 0:
                checkpoints.save(sharded.state(optimizer), place)
    net, whole = TowerNet(num_rows, model, **rows.sizes), sharded.whole()
    if whole:
        net.load_state_dict(whole)
    net.eval()
    return Tower(net, rows, model, text_encoder=encoder)


def _id_map(actions: Actions, model: TowerConfig) -> IdMap | None:
    """Which items have a row of their own where rows are fewer: as if actions came one after the other."""
    if not model.item_rows_max:
        return None
    ids = IdMap(model.item_rows_max, admission_count=model.item_admission_count)
    ids.observe(actions.item_key[np.argsort(actions.time_us, kind="stable")])
    return ids


def _facts(actions: Actions, rows: ItemRows, config: TrainingConfig, model: TowerConfig, seed: int) -> dict[str, Any]:
    """What makes two trainings the same one. How they are spread and how often they are saved does not."""
    data = hashlib.sha256()
    described = [a for a in (*rows.rows.values(), rows.text, rows.price) if a is not None]
    for column in (
        actions.item_key, actions.event_type, actions.time_us, actions.history_stop, rows.vocabulary.keys, *described
    ):  # fmt: skip
        data.update(np.ascontiguousarray(column).data)
    return {
        "data": data.hexdigest()[:16],
        "seed": seed,
        "training": {n: v for n, v in asdict(config).items() if n.startswith("tower_")},
        "model": asdict(model),
    }


def _examples(
    actions: Actions, batch: npt.NDArray[np.int64], weight: npt.NDArray[np.float32], length_max: int, ranks: Ranks
) -> Examples:
    return Examples(
        item_key=actions.item_key[batch],
        weight=weight[batch],
        lengths=actions.history_lengths(batch, length_max),
        histories=actions.histories(batch[ranks.share(len(batch))], length_max),
    )
