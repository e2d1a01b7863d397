"""TorchRec embedding tables whose rows are addressed by item key, category or brand through a private vocabulary.

Row 0 of every table is "unknown": what the vocabulary has never seen, and what training puts in a known id's place now
and then, so that the row means "some item" rather than noise. Nobody outside this package ever sees a row number.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys.core.ids import find_rows

UNKNOWN_ROW = 0

# torchrec 1.9 asks torch 2.13 whether it is being traced by a name that is about to change; nothing a user can mend
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


class Vocabulary:
    """Keys to table rows: key i of `keys` has row i + 1, everything else row 0."""

    def __init__(self, keys: npt.NDArray[np.int64]) -> None:
        """keys: int64 [M], distinct, in row order."""
        self.keys = np.ascontiguousarray(keys, dtype=np.int64)
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted = self.keys[self._order]
        assert not (self._sorted[1:] == self._sorted[:-1]).any(), "a vocabulary's keys are distinct"

    @property
    def num_rows(self) -> int:
        """Rows of the table, row 0 included."""
        return len(self.keys) + 1

    def rows(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each key, 0 where unknown; same shape as `keys`."""
        place = find_rows(self._sorted, keys, self._order)
        return np.where(place < 0, UNKNOWN_ROW, place + 1)


def sequence_tables(
    num_rows: Mapping[str, int], dim: int, features: Mapping[str, Sequence[str]], device: str = "cpu"
) -> EmbeddingCollection:
    """One vector per id. features: table name to the jagged features that look it up.

    device: cpu, or meta for tables that training will cut and fill (recsys.training.sharded).
    """
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=name,
                embedding_dim=dim,
                num_embeddings=rows,
                feature_names=list(features[name]),
                init_fn=start_rows,
            )
            for name, rows in num_rows.items()
        ],
        device=torch.device(device),
    )


def bag_tables(
    num_rows: Mapping[str, int], dim: int, features: Mapping[str, Sequence[str]], device: str = "cpu"
) -> EmbeddingBagCollection:
    """The mean vector of each list of ids (zeros for an empty list). device: as for `sequence_tables`."""
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                embedding_dim=dim,
                num_embeddings=rows,
                feature_names=list(features[name]),
                pooling=PoolingType.MEAN,
                init_fn=start_rows,
            )
            for name, rows in num_rows.items()
        ],
        device=torch.device(device),
    )


def fuse_optimizer(tables: nn.Module, learning_rate: float) -> None:
    """Row-wise Adagrad inside the backward pass: rows are updated as their gradient appears, and no gradient is kept.

    The same declaration becomes the fused FBGEMM kernel when DistributedModelParallel shards the tables.
    Source: torchrec.optim; Duchi et al. 2011 (Adagrad), one accumulator per row.
    """
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": learning_rate, "eps": 1e-8})


def dense_parameters(model: nn.Module, tables: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Parameters of `model` that no table owns: those an ordinary optimizer steps."""
    fused = {id(p) for t in tables for p in t.parameters()}
    return [p for p in model.parameters() if id(p) not in fused]


def table_configs(tables: nn.Module) -> list[EmbeddingConfig]:
    """Name, rows, dimension and features of each table of `sequence_tables` or `bag_tables`."""
    if isinstance(tables, EmbeddingBagCollection):
        return list(tables.embedding_bag_configs())
    return list(tables.embedding_configs())  # type: ignore[operator]


def start_rows(weight: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """What rows hold before training: small and random. In place."""
    return nn.init.normal_(weight, std=0.05, generator=generator)
