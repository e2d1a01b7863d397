"""Feature scaling of the ranker: every raw feature becomes three inputs that keep their meaning under shift.

- its place between the quantiles seen in training, in [-1, 1] (what trees see: order; bounded on a surge day),
- its signed logarithm, standardised and clipped (what the quantiles lose: ratios),
- whether it is missing (then the first two are 0).

Shape legend: N rows, F features, Q quantiles.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

_CLIP = 4.0  # standard deviations


class Scaling(nn.Module):
    """Buffers fitted once on training rows, stored with the weights."""

    quantile_FQ: Tensor
    mean_F: Tensor
    std_F: Tensor

    def __init__(self, num_features: int, quantiles: int) -> None:
        """Unfitted: `fit` or load_state_dict fills it."""
        super().__init__()
        self.register_buffer("quantile_FQ", torch.zeros(num_features, quantiles))
        self.register_buffer("mean_F", torch.zeros(num_features))
        self.register_buffer("std_F", torch.ones(num_features))

    @property
    def num_outputs(self) -> int:
        """Inputs the network sees."""
        return 3 * len(self.mean_F)

    def fit(self, values_NF: npt.NDArray[np.float32]) -> None:
        """Take quantiles, mean and standard deviation per feature from rows; NaN is left out."""
        points = np.linspace(0.0, 1.0, self.quantile_FQ.shape[1])
        for f, column in enumerate(values_NF.T):
            present = column[np.isfinite(column)]
            if not len(present):
                continue
            self.quantile_FQ[f] = torch.from_numpy(np.quantile(present, points).astype(np.float32))
            logged = _signed_log(torch.from_numpy(present.astype(np.float32)))
            self.mean_F[f] = logged.mean()
            self.std_F[f] = max(float(logged.std(correction=0)), 1e-3)

    def forward(self, values_NF: Tensor) -> Tensor:
        """Raw features [N, F], NaN = missing, to inputs [N, 3F]."""
        missing_NF = ~torch.isfinite(values_NF)
        filled_NF = torch.where(missing_NF, 0.0, values_NF)
        place_NF = self._place(filled_NF)
        scaled_NF = ((_signed_log(filled_NF) - self.mean_F) / self.std_F).clamp(-_CLIP, _CLIP)
        keep_NF = ~missing_NF
        return torch.cat([place_NF * keep_NF, scaled_NF * keep_NF, missing_NF.float()], dim=1)

    def _place(self, values_NF: Tensor) -> Tensor:
        """Place between the quantiles, -1 to 1; a value that fills several quantiles sits in their middle."""
        last = self.quantile_FQ.shape[1] - 1
        value_FN = values_NF.T.contiguous()
        low_FN = torch.searchsorted(self.quantile_FQ, value_FN)
        high_FN = torch.searchsorted(self.quantile_FQ, value_FN, right=True)
        below_FN = self.quantile_FQ.gather(1, (low_FN - 1).clamp(0, last))
        above_FN = self.quantile_FQ.gather(1, low_FN.clamp(0, last))
        inside_FN = low_FN - 1 + (value_FN - below_FN) / (above_FN - below_FN).clamp_min(1e-12)
        place_FN = torch.where(high_FN > low_FN, (low_FN + high_FN - 1) / 2, inside_FN).clamp(0, last)
        return (2 * place_FN / last - 1).T


def _signed_log(values: Tensor) -> Tensor:
    return torch.sign(values) * torch.log1p(values.abs())
