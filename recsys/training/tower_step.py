"""The loss of the towers on one batch, for batch training and online training: sampled softmax with logQ correction.

Every rank draws the same random numbers for the whole batch and uses its share of them, so that the loss does not
depend on how many ranks there are.

Shape legend: B examples, b of them this rank's, N items scored against (B positives, then uniform ones), D dimension.
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
from recsys.models.tower import ItemInput, ItemRows, TowerNet
from recsys.training.ranks import Ranks

UNKNOWN_SHARE = 0.05  # of items trained as "unknown", so that row 0 stands for a newcomer


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """B examples of a batch. item_key: what was acted on, int64 [B]; weight: float32 [B].

    lengths: of all histories, int64 [B]; histories: of this rank's share, b of them.
    """

    item_key: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.int64]
    histories: Histories


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch before its step. items, targets: what the rank looks up, and the keys of those after the histories.

    place: of the B positives and the uniform negatives, by row in the vocabulary, int64 [N].
    """

    batch: Examples
    items: ItemInput
    targets: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]


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
        *,
        negatives_min: int = 0,
        unknown_share: float = UNKNOWN_SHARE,
    ) -> None:
        """negatives_min: uniform negatives of a batch smaller than that. unknown_share: of ids hidden."""
        self._negatives_min, self._unknown_share = negatives_min, unknown_share
        self.net, self.rows, self.config, self.chance, self.rng, self.ranks = net, rows, config, chance, rng, ranks

    def prepare(self, batch: Examples) -> Prepared:
        """Draw what is random of the next step, and look up what its items are."""
        ranks, count = self.ranks, len(batch.item_key)
        num_uniform = max(count, self._negatives_min)
        mine, drawn, histories = ranks.share(count), ranks.share(num_uniform), batch.histories
        uniform = self.rng.choice(self.rows.vocabulary.keys, size=num_uniform)
        hidden = self._hidden(batch.lengths, mine, num_uniform, drawn)
        targets = np.concatenate([batch.item_key[mine], uniform[drawn]])
        keys = np.concatenate([histories.item_key, targets])
        items = self.rows.lookup(keys, np.array([*histories.lengths, len(targets)]), hidden)
        place = self.rows.vocabulary.rows(np.concatenate([batch.item_key, uniform]))
        return Prepared(batch, items.to(ranks.device), targets, place)

    def __call__(self, made: Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """The rank's share of the batch's mean loss, and what to save should it be no number."""
        batch, ranks, device, count = made.batch, self.ranks, self.ranks.device, len(made.batch.item_key)
        num_uniform, mine, histories = len(made.place) - count, ranks.share(count), batch.histories
        embedded_VD = self.net.embed(made.items)
        num_history = len(histories.item_key)
        user_bD = self.net.users(
            embedded_VD[:num_history],
            torch.from_numpy(histories.event_type).to(device),
            torch.from_numpy(histories.age_bucket()).to(device),
            torch.from_numpy(histories.lengths).to(device),
        )
        target_nD = self.net.items(embedded_VD[num_history:])
        item_ND = torch.cat(ranks.gathered(target_nD.tensor_split([len(user_bD)]), [count, num_uniform]))
        expected = count * self.chance[made.place] + num_uniform / len(self.rows.vocabulary.keys)
        logit_bN = user_bD @ item_ND.T / self.config.temperature
        logit_bN = logit_bN - torch.from_numpy(np.log(expected)).float().to(device)
        same_bN = torch.from_numpy(made.place[:count][mine, None] == made.place[None, :])
        own = torch.arange(mine.start, mine.stop)
        same_bN[torch.arange(len(own)), own] = False  # an item is no negative of itself
        masked_bN = logit_bN.masked_fill(same_bN.to(device), -1e9)
        loss_b = F.cross_entropy(masked_bN, own.to(device), reduction="none")
        weight_B = torch.from_numpy(batch.weight).to(device)
        saved = {"target": torch.from_numpy(made.targets), "logit": logit_bN.detach()}
        return (loss_b * weight_B[mine]).sum() / weight_B.sum(), saved

    def _hidden(
        self, lengths: npt.NDArray[np.int64], mine: slice, num_uniform: int, drawn: slice
    ) -> npt.NDArray[np.bool_]:
        """Which of the rank's keys, histories then positives then uniform ones, are shown as unknown."""
        edges = np.concatenate([[0], np.cumsum(lengths)])
        chance = self.rng.random(int(edges[-1]) + len(lengths) + num_uniform)
        histories, positive, uniform = np.split(chance < self._unknown_share, [edges[-1], edges[-1] + len(lengths)])
        return np.concatenate([histories[edges[mine.start] : edges[mine.stop]], positive[mine], uniform[drawn]])
