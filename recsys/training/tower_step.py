"""The loss of the towers on one batch, for batch training and online training: sampled softmax with logQ correction.

Every rank draws the same random numbers for the whole batch and uses its share of them, so that the loss does not
depend on how many ranks there are.

Shape legend: B examples, b of them this rank's, N items scored against (B positives, then B uniform), D dimension.
Source: Yi et al. 2019 (logQ correction); Yang et al. 2020 (mixed negative sampling).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.models.config import TowerConfig
from recsys.models.history import Histories
from recsys.models.tower import ItemRows, TowerNet
from recsys.training.ranks import Ranks

_UNKNOWN_SHARE = 0.05  # of items trained as "unknown", so that row 0 stands for a newcomer


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """B examples of a batch. item_key: what was acted on, int64 [B]; weight: float32 [B].

    lengths: of all histories, int64 [B]; histories: of this rank's share, b of them.
    """

    item_key: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]
    histories: Histories


class TowerStep:
    """Loss of one batch. chance: how often each item is a positive, by `place` (0 = not in the catalogue) [M + 1]."""

    def __init__(
        self,
        net: TowerNet,
        rows: ItemRows,
        config: TowerConfig,
        chance: npt.NDArray[np.float64],
        rng: np.random.Generator,
        ranks: Ranks,
    ) -> None:
        self.net, self.rows, self.config, self.chance, self.rng, self.ranks = net, rows, config, chance, rng, ranks

    def __call__(self, batch: Examples) -> tuple[Tensor, dict[str, Tensor]]:
        """The rank's share of the batch's mean loss, and what to save should it be no number."""
        ranks, device, count = self.ranks, self.ranks.device, len(batch.item_key)
        mine, histories = ranks.share(count), batch.histories
        uniform = self.rng.choice(self.rows.vocabulary.keys, size=count)
        hidden = self._hidden(batch.lengths, mine)
        targets = np.concatenate([batch.item_key[mine], uniform[mine]])
        keys = np.concatenate([histories.item_key, targets])
        ids = self.rows.lookup(keys, np.array([*histories.lengths, len(targets)]), hidden)
        embedded_VD = self.net.embed(ids.to(device))
        num_history = len(histories.item_key)
        user_bD = self.net.users(
            embedded_VD[:num_history],
            torch.from_numpy(histories.event_type).to(device),
            torch.from_numpy(histories.age_bucket()).to(device),
            torch.from_numpy(histories.lengths).to(device),
        )
        positive_bD, uniform_bD = self.net.items(embedded_VD[num_history:]).chunk(2)
        item_ND = torch.cat([ranks.gathered(positive_bD, count), ranks.gathered(uniform_bD, count)])
        place = self.rows.vocabulary.rows(np.concatenate([batch.item_key, uniform]))
        expected = count * self.chance[place] + count / len(self.rows.vocabulary.keys)
        logit_bN = user_bD @ item_ND.T / self.config.temperature
        logit_bN = logit_bN - torch.from_numpy(np.log(expected)).float().to(device)
        same_bN = torch.from_numpy(place[mine, None] == place[None, :])
        own = torch.arange(mine.start, mine.stop)
        same_bN[torch.arange(len(own)), own] = False  # an item is no negative of itself
        masked_bN = logit_bN.masked_fill(same_bN.to(device), -1e9)
        loss_b = F.cross_entropy(masked_bN, own.to(device), reduction="none")
        weight_B = torch.from_numpy(batch.weight).to(device)
        saved = {"target": torch.from_numpy(targets), "logit": logit_bN.detach()}
        return (loss_b * weight_B[mine]).sum() / weight_B.sum(), saved

    def _hidden(self, lengths: npt.NDArray[np.int64], mine: slice) -> npt.NDArray[np.bool_]:
        """Which of this rank's keys, histories then positives then uniform ones, are shown as unknown."""
        drawn, count = self.rng.random(int(lengths.sum()) + 2 * len(lengths)) < _UNKNOWN_SHARE, len(lengths)
        histories, positive, uniform = np.split(drawn, [len(drawn) - 2 * count, len(drawn) - count])
        edges = np.concatenate([[0], np.cumsum(lengths)])
        return np.concatenate([histories[edges[mine.start] : edges[mine.stop]], positive[mine], uniform[mine]])
