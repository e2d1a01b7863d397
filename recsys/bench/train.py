"""[heavy] Training steps of one large table and a small network: TorchRec against plain torch, one rank against two.

peer: the same model with torch.nn.EmbeddingBag, sparse gradients and Adagrad, on the same batches. limit: the rows of a
batch gathered and written back, the memory traffic no update can do without. Two ranks of one thread take turns with
one of them alone, each with the same batch per rank: the peer of their row is that one.

Shape legend: B samples, L ids per sample, D dimension, V = B x L.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from recsys.bench.harness import Contest, Row, Work, figure, measure
from recsys.core import Internal
from recsys.models.embeddings import bag_tables
from recsys.training.ranks import Ranks, alone
from recsys.training.sharded import Sharded

_DIM, _IDS, _LEARNING_RATE = 64, 20, 0.05
_HIDDEN = (256, 64)
PARTS = ("data", "lookup", "dense", "communication")
Sizes = Mapping[str, int]


def bench(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Samples per second of whole steps (look-up, pooling, network, backward, both updates), and where a step goes."""
    sizes = (
        {"rows": 1_000, "batch": 64, "steps": 2, "repeats": 2}
        if quick
        else {"rows": 2_000_000, "batch": 8_192, "steps": 12, "repeats": 9}
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ranks, facts = _two_ranks(sizes)  # first: the others hold tables of their own
        rows = [_against_torch(sizes), *ranks]
    finally:
        torch.set_num_threads(threads)
    return {**sizes, "dim": _DIM, "ids": _IDS, "hidden": _HIDDEN, "threads": 1, **facts}, rows


def _against_torch(sizes: Sizes) -> Row:
    batches = make_batches(sizes, seed=0)
    with alone() as ranks:
        ours = Ours(ranks, sizes)
        peer = Peer(sizes)
        weight = torch.randn(sizes["rows"], _DIM)

        def move_rows() -> float:
            for ids, _ in batches:
                unique = torch.from_numpy(np.unique(ids))
                weight[unique] = weight[unique]
            return sizes["steps"] * sizes["batch"]

        contest = Contest(
            what="training, one process of one thread",
            unit="per_s",
            ours=("torchrec, row-wise Adagrad in backward", _steps(ours.step, batches)),
            peer=("torch EmbeddingBag, sparse Adagrad", _steps(peer.step, batches)),
            limit=("rows read and written once", move_rows),
        )
        return measure([contest], repeats=sizes["repeats"])[0]


def _steps(step: Callable[[Any], object], batches: list[Any]) -> Work:
    def work() -> float:
        for batch in batches:
            step(batch)
        return float(sum(len(label) for _, label in batches))

    return work


def _two_ranks(sizes: Sizes) -> tuple[list[Row], dict[str, Any]]:
    """Two processes under torchrun (recsys.bench.train_ranks): rounds of one alone and of both, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rounds.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *torchrun, "-m", "recsys.bench.train_ranks", json.dumps(dict(sizes)), str(out)]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise Internal(
                "bench train, two ranks", came=f"exit code {code}", expected="0", fix="Their message is above."
            )
        rounds = json.loads(out.read_text("utf-8"))
    speed = {who: [r["samples"] / r["wall_s"] for r in rounds[who]] for who in ("one", "two")}
    cpu = {who: [r["samples"] / r["cpu_s"] for r in rounds[who]] for who in ("one", "two")}
    rows = [_paired("two ranks of one thread, each with the batch of one", speed)]
    rows.append(_paired("the same, by CPU second of the busier rank", cpu))
    split = {who: {p: median(r[p] for r in rounds[who]) * 1e3 for p in PARTS[:3]} for who in ("one", "two")}
    # A rank looks up half of every row of both batches, as many bytes as one alone: what tables take beyond that is
    # exchange and waiting.
    split["two"]["communication"] = max(split["two"]["lookup"] - split["one"]["lookup"], 0.0)
    split["two"]["lookup"] = min(split["two"]["lookup"], split["one"]["lookup"])
    rows += [figure(f"step of one rank, {part}", "ms", split["one"][part]) for part in PARTS[:3]]
    rows += [figure(f"step of two ranks, {part}", "ms", split["two"][part]) for part in PARTS]
    return rows, {"two_ranks_sharding": rounds["sharding"]}


def _paired(what: str, speed: Mapping[str, list[float]]) -> Row:
    ours, peer = median(speed["two"]), median(speed["one"])
    ratios = [two / one for two, one in zip(speed["two"], speed["one"], strict=True)]
    spread = {
        role: (max(speed[who]) - min(speed[who])) / median(speed[who])
        for role, who in (("ours", "two"), ("peer", "one"))
    }
    return Row(
        what=what,
        unit="per_s",
        ours=ours,
        peer=peer,
        limit=2 * peer,
        median={"two ranks": ours, "one rank": peer},
        spread=spread | {"ratio": max(ratios) - min(ratios)},
        ratio=median(ratios),
    )


Batch = tuple["np.ndarray[Any, np.dtype[np.int64]]", "np.ndarray[Any, np.dtype[np.float32]]"]


def make_batches(sizes: Sizes, seed: int) -> list[Batch]:
    """(ids [V], label [B]) of each step; popular rows come up more often, and lie anywhere, as in a catalogue."""
    rng = np.random.default_rng(seed)
    row_of_rank = np.random.default_rng(0).permutation(sizes["rows"])
    shape = (sizes["steps"], sizes["batch"] * _IDS)
    ids = row_of_rank[(rng.random(shape) ** 3 * sizes["rows"]).astype(np.int64)]
    label = (rng.random((sizes["steps"], sizes["batch"])) < 0.1).astype(np.float32)
    return list(zip(ids, label, strict=True))


class _Net(nn.Module):
    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables
        first, second = _HIDDEN
        self.dense = nn.Sequential(
            nn.Linear(_DIM, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)
        )


class Ours:
    """The model over TorchRec tables, on any number of ranks. seconds: of the last step by part."""

    def __init__(self, ranks: Ranks, sizes: Sizes) -> None:
        net = _Net(bag_tables({"item": sizes["rows"]}, _DIM, {"item": ["f"]}, "meta"))
        self.sharded = Sharded(
            net,
            ranks,
            table_learning_rate=_LEARNING_RATE,
            seed=0,
            batch_size=sizes["batch"],
            sharding="auto",
        )
        self._optimizer = torch.optim.Adam(self.sharded.dense)
        self._lengths_B = torch.full((sizes["batch"],), _IDS, dtype=torch.int32)
        self._scale = 1 / (ranks.size * sizes["batch"])
        self.sharding = self.sharded.placement()["item"]
        self._ahead: KeyedJaggedTensor | None = None
        self.seconds: dict[str, float] = {}

    def step(self, batch: Batch, following: Batch | None = None) -> float:
        """One step of this rank's batch; the loss. following: the next step's, whose ids are sent meanwhile.

        The step is cut where the tables end and where their gradient arrives, so that each part has its time.
        """
        net, at = self.sharded.net, [time.perf_counter()]
        ids, self._ahead = self._ahead or self._keyed(batch), None
        label_B = torch.from_numpy(batch[1])
        at.append(time.perf_counter())
        pooled_BD = net.tables(ids).values()
        pooled_BD.register_hook(lambda _: at.append(time.perf_counter()))
        if following is not None:
            self._ahead = self._keyed(following)
            self.sharded.send(self._ahead)
        at.append(time.perf_counter())
        loss = _loss(net.dense(pooled_BD), label_B) * self._scale
        self._optimizer.zero_grad()
        self.sharded.backward(loss)
        at.append(time.perf_counter())
        self._optimizer.step()
        at.append(time.perf_counter())
        data, forward, dense, backward, update = np.diff(at).tolist()
        self.seconds = {"data": data, "lookup": forward + backward, "dense": dense + update}
        return float(loss.detach())

    def _keyed(self, batch: Batch) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(keys=["f"], values=torch.from_numpy(batch[0]), lengths=self._lengths_B)


class Peer:
    """The model with torch's own table."""

    def __init__(self, sizes: Sizes) -> None:
        self._bag = nn.EmbeddingBag(sizes["rows"], _DIM, mode="mean", sparse=True)
        self._net = _Net(self._bag)
        self._adagrad = torch.optim.Adagrad(self._bag.parameters(), lr=_LEARNING_RATE)
        self._optimizer = torch.optim.Adam(self._net.dense.parameters())
        self._offsets_B = torch.arange(0, sizes["batch"] * _IDS, _IDS)

    def step(self, batch: Batch) -> float:
        """One step; the loss."""
        self._adagrad.zero_grad()
        self._optimizer.zero_grad()
        pooled_BD = self._bag(torch.from_numpy(batch[0]), self._offsets_B)
        loss = _loss(self._net.dense(pooled_BD), torch.from_numpy(batch[1])) / len(batch[1])
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._adagrad.step()
        return float(loss.detach())


def _loss(logit_B1: Tensor, label_B: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit_B1.squeeze(1), label_B, reduction="sum")
