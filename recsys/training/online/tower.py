"""The towers of a run, learning on: rows of items that somebody acts on, and the user side's dense weights.

The item side's dense weights, those of titles and prices too, the category and brand tables and the "unknown" row stay
as the run has them. So an item's vector changes only with its own row, and a server has to index again only the items a
delta names.

Shape legend: R rows, D dimension, M items of the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from recsys.core import BadInput, RunDirectory
from recsys.models.delta import Rows
from recsys.models.embeddings import UNKNOWN_ROW, table_configs
from recsys.models.tower import ItemInput, Tower, TowerNet
from recsys.training.config import OnlineConfig
from recsys.training.loop import LossGuard, seed_torch
from recsys.training.online.journal import Arrays
from recsys.training.ranks import alone
from recsys.training.sharded import Sharded
from recsys.training.tower_step import Examples, TowerStep

TABLE = "tower.item"
_FIXED = ("item.", "tables.", "text.", "price.")
_PRIOR_ACTIONS = 1_000.0  # what the run's popularity counts for, beside the actions seen since


class _OnlineNet(TowerNet):
    """Gradients reach known item rows only. touched: rows looked up since it was cleared."""

    touched: set[int]

    def embed(self, items: ItemInput) -> Tensor:
        """The sum of all there is of every item, [V, D]."""
        found = self.tables(items.ids)
        row_V = items.ids["item"].values()
        self.touched.update(row_V.unique().tolist())
        item_VD = found["item"].values()
        item_VD = torch.where((row_V != UNKNOWN_ROW)[:, None], item_VD, item_VD.detach())
        fixed: Tensor = self.described(found["category"].values() + found["brand"].values(), items).detach()
        return item_VD + fixed


class OnlineTower:
    """One run's towers in training. `close` lets go of the process group."""

    def __init__(self, run: RunDirectory, config: OnlineConfig, work: Path) -> None:
        """work: where a batch with a broken loss is left.

        Raises: NotFound, CorruptData, VersionMismatch; BadInput for a run with a bounded item table.
        """
        seed_torch(config.seed, config.threads)
        self._stack, self._config = ExitStack(), config
        ranks = self._stack.enter_context(alone())
        start = Tower.load(run)
        if start.config.item_rows_max:
            raise BadInput(
                f"run {run.run_id}, online training", came=f"item_rows_max = {start.config.item_rows_max}",
                expected="a run with a row for every item", fix="Train one with [models.tower] item_rows_max = 0.",
            )  # fmt: skip
        self.rows, self.tower_config = start.items, start.config
        num_rows = {c.name: c.num_embeddings for c in table_configs(start.net.tables)}
        net = _OnlineNet(num_rows, start.config, "meta", **self.rows.sizes)
        net.touched = set()
        self._sharded = Sharded(
            net,
            ranks,
            table_learning_rate=config.table_learning_rate,
            seed=config.seed,
            batch_size=config.batch,
            sharding="row_wise",
        )
        self._sharded.fill(start.net.state_dict())
        self._net = self._sharded.net
        self._weight_RD, self._moment_R = self._sharded.table("item")
        self._learned = {n: p for n, p in self._net.named_parameters() if not n.startswith(_FIXED)}
        self._optimizer = torch.optim.Adam(self._learned.values(), lr=config.learning_rate)
        self._counts = _start_counts(run, self.rows.vocabulary.num_rows, self.rows.vocabulary.rows)
        self.rng = np.random.default_rng(config.seed)
        self._step = TowerStep(
            self._net, self.rows, start.config, self._counts, self.rng, ranks,
            negatives_min=config.negatives_min, unknown_share=0.0,
        )  # fmt: skip
        self._guard, self._steps = LossGuard("online", work), 0
        self.changed = np.zeros(len(self._weight_RD), np.bool_)  # rows that differ from the run's

    def close(self) -> None:
        """Let go."""
        self._stack.close()

    def knows(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """True for items of the run's catalogue."""
        known: npt.NDArray[np.bool_] = self.rows.vocabulary.rows(item_key) != UNKNOWN_ROW
        return known

    def learn(self, examples: Examples) -> tuple[float, npt.NDArray[np.int64]]:
        """One step; the loss and the rows it changed.

        Raises: CorruptData for a loss that is no number or explodes; the batch is saved.
        """
        place = self.rows.vocabulary.rows(examples.item_key)
        fresh = np.unique(place[self.rows.rows["item"][place - 1] == UNKNOWN_ROW])
        with torch.no_grad():  # until now the item was "some item": it starts from there
            self._weight_RD[torch.from_numpy(fresh)] = self._weight_RD[UNKNOWN_ROW].clone()
        self.rows.own(fresh)
        np.add.at(self._counts, place, 1.0)
        self._step.chance = self._counts / self._counts.sum()
        self._net.touched.clear()
        loss, saved = self._step(self._step.prepare(examples))
        value = self._guard.check(loss, self._steps, saved)
        self._optimizer.zero_grad()
        self._sharded.backward(loss)
        self._optimizer.step()
        self._steps += 1
        touched = np.array(sorted(self._net.touched - {UNKNOWN_ROW} | set(fresh.tolist())), np.int64)
        self.changed[touched] = True
        return value, touched

    def arrays(self, rows: npt.NDArray[np.int64]) -> Arrays:
        """What a commit holds of the model: these rows [R], and everything that is not a row."""
        at = torch.from_numpy(rows)
        made = {
            "rows": rows,
            "values": self._weight_RD[at].detach().numpy(),
            "moments": self._moment_R[at].numpy(),
            "counts": self._counts[rows],
            "steps": np.array([self._steps]),
        }
        for name, parameter in self._learned.items():
            made[f"dense.{name}"] = parameter.detach().numpy()
            for moment, tensor in self._optimizer.state[parameter].items():
                made[f"adam.{moment}.{name}"] = tensor.numpy().reshape(parameter.shape if tensor.dim() else (1,))
        return made

    def restore(self, arrays: Arrays, rng: Mapping[str, Any]) -> None:
        """Set what `arrays` gave."""
        at = torch.from_numpy(arrays["rows"])
        with torch.no_grad():
            self._weight_RD[at] = torch.from_numpy(arrays["values"])
            self._moment_R[at] = torch.from_numpy(arrays["moments"])
            for name, parameter in self._learned.items():
                parameter.copy_(torch.from_numpy(arrays[f"dense.{name}"]))
                moments = {m: arrays.get(f"adam.{m}.{name}") for m in ("step", "exp_avg", "exp_avg_sq")}
                self._optimizer.state[parameter] = {
                    m: torch.from_numpy(a.copy()).squeeze() if m == "step" else torch.from_numpy(a.copy())
                    for m, a in moments.items()
                    if a is not None
                }
        self._counts[arrays["rows"]] = arrays["counts"]
        self._steps = int(arrays["steps"][0])
        self.rows.own(arrays["rows"])
        self.changed[arrays["rows"]] = True
        self.rng.bit_generator.state = rng

    def delta_of(self, arrays: Arrays) -> tuple[dict[str, Rows], dict[str, npt.NDArray[np.float32]]]:
        """Tables and dense tensors of a commit's delta, under the names of `recsys.models.delta.target_of`."""
        named = np.isin(arrays["rows"], arrays["touched"])
        keys = self.rows.vocabulary.keys[arrays["rows"][named] - 1]
        dense = {f"tower.{n[len('dense.') :]}": a for n, a in arrays.items() if n.startswith("dense.")}
        return {TABLE: Rows(keys, arrays["values"][named])}, dense


def _start_counts(run: RunDirectory, num_rows: int, rows_of: Any) -> npt.NDArray[np.float64]:
    counts = np.zeros(num_rows)
    if run.has("index/popular.parquet"):
        popular = pl.read_parquet(run.path("index/popular.parquet"), columns=["item_key", "score"])
        np.add.at(counts, rows_of(popular["item_key"].to_numpy()), popular["score"].to_numpy())
    counts[UNKNOWN_ROW] = 0.0
    total = counts.sum()
    return counts * (_PRIOR_ACTIONS / total) if total else counts
