"""Jagged features: lists of different lengths as flat values and lengths, the form TorchRec reads.

Shape legend: B examples, V values of all examples together, L longest list, D dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core import BadInput


@dataclass(frozen=True, slots=True)
class Jagged:
    """B lists. values: int64 [V], list after list; lengths: int32 [B], their sum is V."""

    values: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        if (self.lengths < 0).any() or int(self.lengths.sum()) != len(self.values):
            raise BadInput(
                "jagged feature",
                came=f"lengths that sum to {int(self.lengths.sum())} for {len(self.values)} values",
                expected="lengths of at least 0 that sum to the number of values",
                fix="Pass one length per example.",
            )

    @classmethod
    def from_lists(cls, lists: Sequence[npt.NDArray[np.int64]]) -> Jagged:
        """From B arrays."""
        values = np.concatenate(lists) if lists else np.empty(0, np.int64)
        return cls(values.astype(np.int64), np.fromiter((len(x) for x in lists), np.int32, len(lists)))

    @classmethod
    def from_ranges(
        cls, column: npt.NDArray[np.int64], start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64]
    ) -> Jagged:
        """List i is column[start[i]:stop[i]], without a Python loop."""
        lengths = np.maximum(stop - start, 0)
        return cls(column[range_rows(start, lengths)], lengths.astype(np.int32))


def range_rows(start: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The row numbers start[i], start[i]+1, ... (lengths[i] of them) of every i, one after the other; int64 [V]."""
    ends = np.cumsum(lengths)
    offsets = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) - np.repeat(ends - lengths, lengths)
    rows: npt.NDArray[np.int64] = np.repeat(start, lengths) + offsets
    return rows


def keyed(features: Mapping[str, Jagged]) -> KeyedJaggedTensor:
    """One KeyedJaggedTensor of several features over the same B examples.

    Raises: BadInput when they disagree about B.
    """
    sizes = {name: len(f.lengths) for name, f in features.items()}
    if len(set(sizes.values())) > 1:
        raise BadInput(
            "jagged features", came=sizes, expected="as many lists in each", fix="Pass one list per example."
        )
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.from_numpy(np.concatenate([f.values for f in features.values()])),
        lengths=torch.from_numpy(np.concatenate([f.lengths for f in features.values()])),
    )


def padded(values_VD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Jagged rows as (dense [B, L, D] padded with zeros at the end, mask [B, L] true where a value is); L >= 1."""
    longest = max(1, int(lengths_B.max()) if len(lengths_B) else 1)
    mask_BL = torch.arange(longest)[None, :] < lengths_B[:, None]
    dense_BLD = values_VD.new_zeros(len(lengths_B), longest, values_VD.shape[-1])
    dense_BLD[mask_BL] = values_VD
    return dense_BLD, mask_BL
