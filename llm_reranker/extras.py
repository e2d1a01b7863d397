"""What a reranker has beyond Qwen3: an item encoder (MixLM's soft tokens) and the signals' way in. Heavy: torch.

Signals of a candidate are its features, marks of missing ones, and how like the context its soft tokens are.
raw log-odds = hidden . (w_yes - w_no) + score projection(signals); the signals are also added to the input of the last
token, so that the layers see them. At birth the score is the ranker's own: the language model adds to it.

Likeness is there because a small network that starts from nothing finds "same words as in the history" only after
hundreds of steps, by luck of the seed; as a cosine of token vectors it is there from the first step.

Shape legend: B requests, N candidates, L text tokens, P prefix tokens, D hidden, C collaborative embedding width,
S soft tokens, F features, X signals = 2 F + 2.
Source: MixLM, arXiv 2512.07846, section 3 (one embedding token per item beside a shared prefix); the maximum over the
context's tokens is ColBERT's late interaction, arXiv 2004.12832.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CLOSEST_SCALE, _MEAN_SCALE = 4.0, 20.0  # cosines of random vectors are small; this makes signals of about unit spread


class Extras(nn.Module):
    """Item encoder and feature projections of one reranker."""

    def __init__(self, hidden: int, feature_names: tuple[str, ...], embedding_dim: int, soft_tokens: int) -> None:
        super().__init__()
        self.feature_names, self.embedding_dim, self.soft_tokens = feature_names, embedding_dim, soft_tokens
        columns = 2 * len(feature_names) + 2
        self.encoder_in = nn.Linear(hidden + embedding_dim + 1, 2 * hidden)
        self.encoder_out = nn.Linear(2 * hidden, soft_tokens * hidden)
        self.text_scale = nn.Parameter(torch.ones(()))
        self.signals_to_hidden = nn.Linear(columns, hidden, bias=False)
        self.score = nn.Linear(columns, 1)
        self.feature_mean: Tensor
        self.feature_std: Tensor
        self.register_buffer("feature_mean", torch.zeros(len(feature_names)))
        self.register_buffer("feature_std", torch.ones(len(feature_names)))
        self._log_columns = [i for i, name in enumerate(feature_names) if name.endswith("_position")]

    def start_as_ranker(self, features_NF: Tensor, std: float) -> None:
        """Take the features' scale, and set the weights so that the score is the feature `rank_score` itself."""
        x = self._logged(features_NF)
        present = ~x.isnan()
        count = present.sum(0).clamp(min=1)
        mean = x.nan_to_num(0).sum(0) / count
        spread = (torch.where(present, x - mean, 0.0).pow(2).sum(0) / count).sqrt()
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(spread > 1e-6, spread, 1.0))
        rank = self.feature_names.index("rank_score")
        with torch.no_grad():
            for layer in (self.encoder_in, self.encoder_out):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
            self.encoder_out.weight.mul_(0.3 * std)
            nn.init.zeros_(self.signals_to_hidden.weight)
            self.text_scale.fill_(std)
            nn.init.zeros_(self.score.weight)
            self.score.weight[0, rank] = self.feature_std[rank]
            self.score.bias[0] = self.feature_mean[rank]

    def signals(self, features_BNF: Tensor, soft_BNSD: Tensor, prefix_BPD: Tensor, real_BP: Tensor) -> Tensor:
        """Raw features (NaN = missing), soft tokens and the contexts' input vectors to signals [B, N, X]."""
        x = self._logged(features_BNF)
        missing = x.isnan()
        scaled = ((x - self.feature_mean) / self.feature_std).clamp(-10, 10)
        item_BND, context_BPD = F.normalize(soft_BNSD.mean(2), dim=-1), F.normalize(prefix_BPD, dim=-1)
        cosine_BNP, real_B1P = item_BND @ context_BPD.transpose(1, 2), real_BP[:, None]
        closest = cosine_BNP.masked_fill(~real_B1P, -1).amax(-1)
        mean = (cosine_BNP * real_B1P).sum(-1) / real_B1P.sum(-1)
        likeness = torch.stack([closest * _CLOSEST_SCALE, mean * _MEAN_SCALE], -1)
        return torch.cat([torch.where(missing, 0.0, scaled), missing.float(), likeness], -1)

    def encode(self, text_NLD: Tensor, real_NL: Tensor, embedding_NC: Tensor) -> Tensor:
        """Soft tokens [N, S, D] of items.

        text_NLD: input vectors of the text's tokens, real_NL which of them count (an empty text is fine).
        embedding_NC: collaborative embedding of any length, NaN rows where the item has none.
        """
        summed = (text_NLD * real_NL[..., None]).sum(1)
        text_ND = F.rms_norm(summed, summed.shape[-1:], eps=1e-6)
        missing_N1 = embedding_NC.isnan().any(-1, keepdim=True)
        unit = F.normalize(embedding_NC.nan_to_num(0), dim=-1) * max(self.embedding_dim, 1) ** 0.5
        joined = torch.cat([text_ND, torch.where(missing_N1, 0.0, unit), missing_N1.float()], -1)
        out: Tensor = self.encoder_out(F.silu(self.encoder_in(joined)))
        return out.view(len(text_NLD), self.soft_tokens, -1) + self.text_scale * text_ND[:, None]

    def _logged(self, features: Tensor) -> Tensor:
        x = features.float().clone()
        x[..., self._log_columns] = torch.log1p(x[..., self._log_columns].clamp(min=0))
        return x
