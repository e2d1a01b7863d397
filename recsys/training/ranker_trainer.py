"""Trains the ranker on lists: which of these candidates did the user act on.

Loss per list: softmax cross-entropy over all relevant candidates (order), plus every relevant row against every other
one by what swapping them would change in NDCG (the first places), plus binary cross-entropy (level). Every epoch sees
all relevant rows of a list and a fresh sample of the others.

Shape legend: Q lists of a batch, C rows kept of each, N = Q x C, X network inputs.
Source: Cao et al. 2007 (ListNet, top-one softmax); Burges et al. 2006 (LambdaRank); Wang et al. 2018 (LambdaLoss,
section 3.2, the bound that makes it a loss); Platt 1999.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core.items import ItemTable
from recsys.core.progress import bar
from recsys.models.config import RankerConfig
from recsys.models.embeddings import Vocabulary, dense_parameters, fuse_optimizer
from recsys.models.ranker import Calibration, Prior, Ranker, RankerNet
from recsys.training.config import TrainingConfig
from recsys.training.loop import LossGuard, seed_torch
from recsys.training.rank_lists import RankLists
from recsys.training.validation import ndcg

_PRIOR_WEIGHTS = (0.0, 1.0, 4.0, 16.0, 64.0)
_LEVEL_WEIGHT = 0.5  # of the binary loss beside the list loss
_SWAP_WEIGHT = 2.0  # of the swaps beside it
_SWAP_PLACES = 20  # beyond these a place is worth nothing
_IDEAL_PLACES = 10


def train_ranker(
    lists: RankLists, items: ItemTable, *, config: TrainingConfig, model: RankerConfig, seed: int, work: Path
) -> Ranker:
    """A ranker trained on `lists`; its logits are not calibrated yet. work: where a bad batch is left."""
    seed_torch(seed, config.threads)
    rng = np.random.default_rng(seed)
    vocabulary = Vocabulary(items.item_key)
    net = RankerNet(len(lists.names), vocabulary.num_rows, model)
    ranker = Ranker(net, lists.names, vocabulary, model)
    net.scaling.fit(lists.values)
    useful = np.unique(lists.query_of_row()[lists.label])
    if not len(useful):
        net.eval()
        return ranker  # nothing was found that anybody acted on: all scores stay equal
    fuse_optimizer(net.tables, config.ranker_table_learning_rate)
    optimizer = torch.optim.AdamW(
        dense_parameters(net, [net.tables]), lr=config.ranker_learning_rate, weight_decay=config.ranker_weight_decay
    )
    num_batches = -(-len(useful) // config.ranker_batch_queries)
    epochs = max(config.ranker_epochs, -(-config.ranker_steps_min // num_batches))
    epochs = max(min(epochs, config.ranker_steps_max // num_batches), 1)
    steps = epochs * num_batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.ranker_learning_rate, total_steps=steps)
    guard = LossGuard("ranker", work)
    net.train()
    with bar(total=steps, what="ranker", unit="batch") as progress:
        for _ in range(epochs):
            rows = _sample(lists, config.ranker_rows_per_query, rng)
            for batch in np.array_split(rng.permutation(useful), num_batches):
                loss, saved = _loss(ranker, lists, batch, rows[batch])
                value = guard.check(loss, int(progress.n), saved)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                progress.set_postfix(loss=f"{value:.3f}", refresh=False)
                progress.update()
    net.eval()
    return ranker


def score_lists(ranker: Ranker, lists: RankLists) -> npt.NDArray[np.float32]:
    """Scores [N] of every row, list by list as serving does it."""
    scores = np.empty(len(lists.label), np.float32)
    for q, (start, stop) in enumerate(zip(lists.offsets[:-1], lists.offsets[1:], strict=True)):
        one = lists.histories.take(np.array([q]))
        scores[start:stop] = ranker.score(
            lists.values[start:stop],
            lists.names,
            lists.item_key[start:stop],
            one.item_key,
            one.event_type.astype(np.int8),
            one.time_us,
            int(one.as_of_us[0]),
        )
    return scores


def choose_prior(ranker: Ranker, lists: RankLists) -> Prior:
    """How much the retrieval stage's order should count, by NDCG@10 on lists the ranker has not seen.

    The smallest weight among the best; none where the lists have no such feature.
    """
    if Prior().feature not in lists.names:
        return Prior()
    ranker.prior = Prior(weight=0.0)
    alone = score_lists(ranker, lists)
    ranker.prior = Prior(weight=1.0)
    place = score_lists(ranker, lists) - alone
    quality = [ndcg(lists, alone + weight * place).mean() for weight in _PRIOR_WEIGHTS]
    return Prior(weight=_PRIOR_WEIGHTS[int(np.argmax(quality))])


def calibrate(logit: npt.NDArray[np.float32], label: npt.NDArray[np.bool_]) -> Calibration:
    """Slope and intercept that make sigmoid(slope * logit + intercept) fit the labels best (maximum likelihood).

    The identity when the labels are all alike. The slope is kept positive, so that the order stays.
    """
    if label.all() or not label.any():
        return Calibration()
    log_slope, intercept = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    x, y = torch.from_numpy(logit.astype(np.float32)), torch.from_numpy(label.astype(np.float32))
    optimizer = torch.optim.LBFGS([log_slope, intercept], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(log_slope.exp() * x + intercept, y)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Calibration(log_slope.exp().item(), intercept.item())


def _sample(lists: RankLists, rows_max: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """For every list up to `rows_max` rows, relevant ones first, the rest at random; int64 [lists, C], -1 = no row."""
    query = lists.query_of_row()
    chance = rng.random(len(query)) - lists.label
    order = np.lexsort((chance, query))
    place = np.arange(len(query)) - lists.offsets[query]
    rows = np.full((len(lists), rows_max), -1, np.int64)
    kept = place < rows_max
    rows[query[kept], place[kept]] = order[kept]
    return rows


def _loss(
    ranker: Ranker, lists: RankLists, batch: npt.NDArray[np.int64], rows_QC: npt.NDArray[np.int64]
) -> tuple[Tensor, dict[str, Tensor]]:
    filled = rows_QC >= 0
    rows = rows_QC[filled]
    query = torch.from_numpy(np.nonzero(filled)[0])
    values = torch.from_numpy(lists.values[rows])
    ids = ranker.ids(lists.item_key[rows], lists.histories.take(batch))
    logit_N = ranker.net(ranker.net.scaling(values), ids, query)
    label_N = torch.from_numpy(lists.label[rows].astype(np.float32))
    mask_QC = torch.from_numpy(filled)
    logit_QC = logit_N.new_full(mask_QC.shape, -1e9)
    logit_QC[mask_QC] = logit_N
    label_QC = torch.zeros_like(logit_QC)
    label_QC[mask_QC] = label_N
    target_QC = label_QC / label_QC.sum(dim=1, keepdim=True)
    order = -(target_QC * torch.log_softmax(logit_QC, dim=1)).sum(dim=1).mean()
    swaps = _swaps(logit_QC, label_QC, mask_QC)
    level = F.binary_cross_entropy_with_logits(logit_N, label_N)
    saved = {
        "values": values,
        "label": label_N,
        "logit": logit_N.detach(),
        "item_key": torch.from_numpy(lists.item_key[rows]),
    }
    return order + _SWAP_WEIGHT * swaps + _LEVEL_WEIGHT * level, saved


def _swaps(logit_QC: Tensor, label_QC: Tensor, mask_QC: Tensor) -> Tensor:
    """Mean over lists of log(1 + exp(other - relevant)), weighted by what swapping the two would change in NDCG."""
    with torch.no_grad():
        place_QC = logit_QC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        worth_QC = torch.where(place_QC < _SWAP_PLACES, 1.0 / torch.log2(place_QC + 2.0), 0.0)
        ideal = torch.cumsum(1.0 / torch.log2(torch.arange(2.0, _IDEAL_PLACES + 2.0)), dim=0)
        ideal_Q = ideal[(label_QC.sum(dim=1).long() - 1).clamp(0, _IDEAL_PLACES - 1)]
        change_QCC = (worth_QC[:, :, None] - worth_QC[:, None, :]).abs() / ideal_Q[:, None, None]
        relevant_QC, other_QC = label_QC > 0, mask_QC & (label_QC == 0)
        change_QCC *= relevant_QC[:, :, None] & other_QC[:, None, :]
    behind_QCC = F.softplus(logit_QC[:, None, :] - logit_QC[:, :, None])
    return (change_QCC * behind_QCC).sum(dim=(1, 2)).mean()
