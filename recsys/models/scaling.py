"""Feature scaling of the ranker: every raw feature becomes a few inputs that keep their meaning under shift.

- its place among the rows seen in training, in [-1, 1] (what trees see: order; bounded on a surge day),
- its signed logarithm, standardised and clipped (what the quantiles lose: ratios),
- whether it is missing (then all others are 0),
- how far its place has filled each of B equal bins, in [0, 1]: a linear layer over them bends where trees would split.

Shape legend: N rows, F features, Q quantiles, B bins.
Source: Gorishniy et al. 2022, "On embeddings for numerical features in tabular deep learning", section 3.2 (piecewise
linear encoding, quantile bins).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

_CLIP = 4.0  # standard deviations


class Scaling(nn.Module):
    """Buffers fitted once on training rows, stored with the weights."""

    point_FQ: Tensor
    place_FQ: Tensor
    mean_F: Tensor
    std_F: Tensor

    def __init__(self, num_features: int, quantiles: int, bins: int = 0) -> None:
        """Unfitted: `fit` or load_state_dict fills it. bins: 0 = none."""
        super().__init__()
        self.bins = bins
        self.register_buffer("point_FQ", torch.zeros(num_features, quantiles))
        self.register_buffer("place_FQ", torch.zeros(num_features, quantiles))
        self.register_buffer("mean_F", torch.zeros(num_features))
        self.register_buffer("std_F", torch.ones(num_features))

    @property
    def num_outputs(self) -> int:
        """Inputs the network sees."""
        return (3 + self.bins) * len(self.mean_F)

    def fit(self, values_NF: npt.NDArray[np.float32]) -> None:
        """Take quantiles, mean and standard deviation per feature from rows; NaN is left out."""
        num_points = self.point_FQ.shape[1]
        for f, column in enumerate(values_NF.T):
            present = np.sort(column[np.isfinite(column)])
            if not len(present):
                continue
            point = np.unique(np.quantile(present, np.linspace(0.0, 1.0, num_points), method="nearest"))
            middle = np.searchsorted(present, point) + np.searchsorted(present, point, side="right")
            place = middle / len(present) - 1.0
            fill = np.minimum(np.arange(num_points), len(point) - 1)  # fewer values than quantiles: repeat the last
            self.point_FQ[f] = torch.from_numpy(point[fill].astype(np.float32))
            self.place_FQ[f] = torch.from_numpy(place[fill].astype(np.float32))
            logged = _signed_log(torch.from_numpy(present.astype(np.float32)))
            self.mean_F[f] = logged.mean()
            self.std_F[f] = max(float(logged.std(correction=0)), 1e-3)

    def forward(self, values_NF: Tensor) -> Tensor:
        """Raw features [N, F], NaN = missing, to inputs [N, (3 + B) F]: places, logarithms, missing, bins."""
        return self.spread(self.encode(values_NF))

    def encode(self, values_NF: Tensor) -> Tensor:
        """Places and logarithms of raw features, [N, 2 F], NaN where missing: what training works out once per row."""
        missing_NF = ~torch.isfinite(values_NF)
        filled_NF = torch.where(missing_NF, 0.0, values_NF)
        scaled_NF = ((_signed_log(filled_NF) - self.mean_F) / self.std_F).clamp(-_CLIP, _CLIP)
        encoded = torch.cat([self._place(filled_NF), scaled_NF], dim=1)
        return encoded.masked_fill_(missing_NF.repeat(1, 2), torch.nan)

    def spread(self, encoded: Tensor) -> Tensor:
        """Inputs [N, (3 + B) F] of what `encode` gave."""
        missing = torch.isnan(encoded)
        missing_NF = missing[:, : len(self.mean_F)]
        place_NF = encoded[:, : len(self.mean_F)]
        parts = [torch.where(missing, 0.0, encoded), missing_NF.float()]
        filled_bins_NF = torch.where(missing_NF, -1.0, place_NF).add_(1.0).mul_(self.bins / 2.0)
        parts += [(filled_bins_NF - b).clamp_(0.0, 1.0) for b in range(self.bins)]
        return torch.cat(parts, dim=1)

    def _place(self, values_NF: Tensor) -> Tensor:
        """Place among the training rows, -1 (below all) to 1, linear between points; rows that tie share the middle."""
        last = self.point_FQ.shape[1] - 1
        value_FN = values_NF.T.contiguous()
        above_FN = torch.searchsorted(self.point_FQ, value_FN)
        low_FN, high_FN = (above_FN - 1).clamp_min(0), above_FN.clamp_max(last)
        point_FN, place_FN = self.point_FQ.gather(1, low_FN), self.place_FQ.gather(1, low_FN)
        width_FN = (self.point_FQ.gather(1, high_FN) - point_FN).clamp_min(1e-12)
        share_FN = ((value_FN - point_FN) / width_FN).clamp(0.0, 1.0)
        return torch.lerp(place_FN, self.place_FQ.gather(1, high_FN), share_FN).T


def _signed_log(values: Tensor) -> Tensor:
    return torch.sign(values) * torch.log1p(values.abs())
