"""A bounded table for unbounded ids: which keys have a row of their own now, decided as keys stream by.

TorchRec's sort-based managed collision: of each batch, keys that come often enough are admitted; when rows are short,
the keys with the least frequency for their age lose theirs. Row numbers stay inside this package.
Source: torchrec.modules.mc_modules, MCHManagedCollisionModule, DistanceLFU_EvictionPolicy.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.modules.mc_modules import DistanceLFU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.models.embeddings import UNKNOWN_ROW

BATCH_KEYS = 65_536  # at most so many are looked at together; larger batches are cut
_FEATURE = "id"
_DECAY = 1.0  # exponent of age: frequency / age


class IdMap:
    """Keys to rows 1 to `rows_max`; every other key has row 0. Memory: rows_max and BATCH_KEYS, never the keys seen."""

    def __init__(self, rows_max: int, *, admission_count: int = 1) -> None:
        """admission_count: how often a key has to come within a batch to be given a row."""
        self.rows_max = rows_max

        def often_enough(counts: Tensor) -> tuple[Tensor, int]:
            return counts >= admission_count, admission_count

        self._module = MCHManagedCollisionModule(
            zch_size=rows_max + 1,  # its last row is the one of those without
            device=torch.device("cpu"),
            eviction_policy=DistanceLFU_EvictionPolicy(_DECAY, threshold_filtering_func=often_enough),
            eviction_interval=1,
        )
        # it would size its buffer by the first batch, and cut later ones to that
        self._module._init_history_buffers({_FEATURE: _jagged(np.zeros(BATCH_KEYS, np.int64))})

    def observe(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Take a batch of keys [N], repeats counting; the rows that now belong to another key, to be started anew."""
        given = [np.empty(0, np.int64)]
        for start in range(0, len(keys), BATCH_KEYS):
            self._module.profile({_FEATURE: _jagged(keys[start : start + BATCH_KEYS])})
            evicted = self._module.evict()
            if evicted is not None:
                given.append(evicted.numpy().astype(np.int64) + 1)
        rows = np.unique(np.concatenate(given))
        return rows[rows <= self.rows_max]

    def rows(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each key, 0 where it has none; int64 [N]."""
        found: npt.NDArray[np.int64] = self._module.remap({_FEATURE: _jagged(keys)})[_FEATURE].values().numpy() + 1
        return np.where(found <= self.rows_max, found, UNKNOWN_ROW)

    def state(self) -> dict[str, Tensor]:
        """Tensors to be saved with a model or a checkpoint."""
        return dict(self._module.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave, of a map with as many rows."""
        self._module.load_state_dict(dict(state))


def _jagged(keys: npt.NDArray[np.int64]) -> JaggedTensor:
    return JaggedTensor(values=torch.from_numpy(np.ascontiguousarray(keys)), lengths=torch.tensor([len(keys)]))
