"""Trains the ranker on lists: which of these candidates did the user act on, and how.

Loss per list: softmax cross-entropy over all relevant candidates (order), plus every relevant row against every other
one by what swapping them would change in NDCG (the first places), plus binary cross-entropy (level). Lists of both
tasks, all and new-only, are learnt from: beside what the user bought before, new items would hardly matter in the
former, and a shelf of new things has nothing else. Every epoch sees all relevant rows of a list and another sample of
the others.

The heads beside the target's learn from the same rows by a loss of the same kind, each with labels of its own;
`training.ranker_heads_share` of their gradients reaches the hidden layer, which is the target's.

Shape legend: Q lists of a batch, C rows kept of each, N = Q x C, R relevant ones of them, X network inputs, B
behaviours with a head beside the target's.
Source: Cao et al. 2007 (ListNet, top-one softmax); Burges et al. 2006 (LambdaRank); Wang et al. 2018 (LambdaLoss,
section 3.2, the bound that makes it a loss); Platt 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core.events import EventType
from recsys.core.items import ItemTable
from recsys.core.progress import bar
from recsys.models.config import RankerConfig
from recsys.models.embeddings import Vocabulary, dense_parameters, fuse_optimizer
from recsys.models.ranker import Calibration, Head, Prior, Ranker, RankerNet
from recsys.training.config import TrainingConfig
from recsys.training.loop import LossGuard, seed_torch
from recsys.training.rank_lists import RankLists
from recsys.training.validation import as_good, ndcg

_RETRIEVAL, _OWN_HISTORY = Prior("retrieval", 1.0), Prior("own_history", 1.0)
_CART = Prior("own_history", 1.0, among="own_carts")
_PRIOR_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 64.0)
_LEVEL_WEIGHT = 0.5  # of the binary loss beside the list loss
_SWAP_WEIGHT = 2.0  # of the swaps beside it
_NEW_ONLY_WEIGHT = 0.5  # of a list of new items alone, beside a list of all
_SWAP_PLACES = 20  # beyond these a place is worth nothing
_IDEAL_PLACES = 10
_SLOPE_MIN = 1e-3  # of a calibration
_ENCODED_ROWS, _SCORED_LISTS = 16_384, 32  # at a time: bounds of memory


def train_ranker(
    lists: RankLists,
    items: ItemTable,
    *,
    heads: Sequence[str],
    config: TrainingConfig,
    model: RankerConfig,
    seed: int,
    work: Path,
) -> Ranker:
    """A ranker trained on `lists`; its logits are not calibrated yet.

    heads: what the labels are called, then the behaviours to foresee beside them; see `heads_of`. work: where a bad
    batch is left.
    """
    seed_torch(seed, config.threads)
    rng = np.random.default_rng(seed)
    vocabulary = Vocabulary(items.item_key)
    net = RankerNet(len(lists.names), vocabulary.num_rows, model, len(heads) - 1)
    ranker = Ranker(net, lists.names, vocabulary, model, heads=[Head(name) for name in heads])
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
    encoded = _encode(net, lists)
    did = np.stack([lists.label, *(lists.did(behaviour) for behaviour in heads[1:])], axis=1)
    net.train()
    with bar(total=steps, what="ranker", unit="batch") as progress:
        for _ in range(epochs):
            rows = _sample(lists, config.ranker_rows_per_query, rng)
            for batch in np.array_split(rng.permutation(useful), num_batches):
                loss, saved = _loss(ranker, lists, encoded, did, batch, rows[batch], config.ranker_heads_share)
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
    """Scores [N] of every row, as serving gives them."""
    scores = _logits(ranker, lists) + ranker.leaning(lists.values, lists.query_of_row())
    return ranker.heads[0].calibration(scores)


def other_logits(ranker: Ranker, lists: RankLists) -> npt.NDArray[np.float32]:
    """Logits [N, B] of every row, of the heads beside the target's, not calibrated."""
    return _logits(ranker, lists, every=True)[:, 1:]


def choose_priors(ranker: Ranker, lists: RankLists) -> tuple[Prior, ...]:
    """How much other orders should count beside the network, by NDCG@10 on lists the ranker has not seen.

    Weights within one standard error of the best, by user, are taken for equal. Of retrieval's the smallest is chosen
    that is not 0: a little of an order that is as good as the network's own rather helps than harms. Of the cart's, the
    items that the shopper once put there in own history's order, it is the largest, where purchases are foreseen: the
    network knows how often such things are bought on ordinary days, and at a sale they are bought. Where carts have no
    say it is own history's, in full if that is as good, else the smallest: what shoppers did before carries over to
    days that are unlike those trained on, and what else was learnt need not. Each task has weights of its own, from its
    own lists. Orders that the lists do not have are left out.
    """
    of_all, of_new = (_weights(ranker, lists.of_task(new_only=new_only)) for new_only in (False, True))
    priors = (replace(prior, weight=of_all[prior], fresh_weight=of_new[prior]) for prior in of_all)
    return tuple(prior for prior in priors if prior.weight or prior.fresh_weight)


def _weights(ranker: Ranker, lists: RankLists) -> dict[Prior, float]:
    """The weight of each prior, chosen one after another on lists of one task; 0 where nothing can be said."""
    score, weights = _logits(ranker, lists), dict.fromkeys((_RETRIEVAL, _CART, _OWN_HISTORY), 0.0)
    buys = ranker.heads[0].foresees == EventType.PURCHASE.label
    for prior in weights:
        if (prior is _CART and not buys) or (prior is _OWN_HISTORY and weights[_CART]):
            continue
        if len(lists) and set(prior.features) <= set(lists.names):
            worth = prior.worth(lists.values, lists.names, lists.query_of_row())
            weights[prior] = _weight(lists, score, worth, prior)
            score = score + weights[prior] * worth
    return weights


def _weight(lists: RankLists, score: npt.NDArray[np.float32], worth: npt.NDArray[np.float32], prior: Prior) -> float:
    """Of the weights as good as the best the one that suits the prior; see `choose_priors`."""
    if not worth.any():
        return 0.0
    equal = np.flatnonzero(as_good(np.stack([ndcg(lists, score + weight * worth) for weight in _PRIOR_WEIGHTS])))
    if prior is _RETRIEVAL:
        return _PRIOR_WEIGHTS[min(equal[equal > 0], default=0)]
    in_full = equal[-1] == len(_PRIOR_WEIGHTS) - 1
    return _PRIOR_WEIGHTS[equal[-1] if prior is _CART or in_full else equal[0]]


def _logits(ranker: Ranker, lists: RankLists, *, every: bool = False) -> npt.NDArray[np.float32]:
    """Of the target's head [N], or of every head [N, 1 + B]."""
    of = ranker.every_logit if every else ranker.logits
    logits = np.empty((len(lists.label), len(ranker.heads)) if every else len(lists.label), np.float32)
    for start in range(0, len(lists), _SCORED_LISTS):
        chosen = np.arange(start, min(start + _SCORED_LISTS, len(lists)))
        rows = slice(lists.offsets[start], lists.offsets[chosen[-1] + 1])
        query = np.repeat(chosen - start, np.diff(lists.offsets)[chosen])
        logits[rows] = of(lists.values[rows], lists.item_key[rows], lists.histories.take(chosen), query)
    return logits


def calibrate(logit: npt.NDArray[np.float32], label: npt.NDArray[np.bool_]) -> Calibration:
    """Slope and intercept that make sigmoid(slope * logit + intercept) fit the labels best (maximum likelihood).

    The identity when the labels are all alike. The slope is at least `_SLOPE_MIN`, so that the order stays, in float32
    too, where the logits say nothing of the labels or the contrary.
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
    found = log_slope.exp().item()
    slope = max(found, _SLOPE_MIN)
    return Calibration(slope, intercept.item() - (slope - found) * x.mean().item())


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


def _encode(net: RankerNet, lists: RankLists) -> Tensor:
    """What the network's scaling says of every row, in half precision: worked out once, not in every epoch."""
    encoded = torch.empty(len(lists.label), 2 * lists.values.shape[1], dtype=torch.float16)
    with torch.inference_mode():
        for start in range(0, len(encoded), _ENCODED_ROWS):
            part = slice(start, start + _ENCODED_ROWS)
            encoded[part] = net.scaling.encode(torch.from_numpy(lists.values[part]))
    return encoded


def _loss(
    ranker: Ranker,
    lists: RankLists,
    encoded: Tensor,
    did: npt.NDArray[np.bool_],
    batch: npt.NDArray[np.int64],
    rows_QC: npt.NDArray[np.int64],
    share: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    filled = rows_QC >= 0
    rows = rows_QC[filled]
    query = torch.from_numpy(np.nonzero(filled)[0])
    ids = ranker.ids(lists.item_key[rows], lists.histories.take(batch))
    x_NX = ranker.net.scaling.spread(encoded[torch.from_numpy(rows)].float())
    logit_N, others_NB = ranker.net.every(x_NX, ids, query, share)
    did_NB = torch.from_numpy(did[rows].astype(np.float32))
    mask_QC = torch.from_numpy(filled)
    weight_Q = torch.from_numpy(np.where(lists.new_only[batch], _NEW_ONLY_WEIGHT, 1.0).astype(np.float32))
    loss = _head_loss(logit_N, did_NB[:, 0], query, mask_QC, weight_Q)
    for other_N, label_N in zip(others_NB.unbind(dim=1), did_NB[:, 1:].unbind(dim=1), strict=True):
        loss = loss + _head_loss(other_N, label_N, query, mask_QC, weight_Q)
    saved = {
        "values": torch.from_numpy(lists.values[rows]),
        "label": did_NB[:, 0],
        "logit": logit_N.detach(),
        "item_key": torch.from_numpy(lists.item_key[rows]),
    }
    return loss, saved


def _head_loss(logit_N: Tensor, label_N: Tensor, query_N: Tensor, mask_QC: Tensor, weight_Q: Tensor) -> Tensor:
    """Order, of the lists in which somebody did it, and level; mask_QC: where there is a row, N in all."""
    logit_QC = logit_N.new_full(mask_QC.shape, -1e9)
    logit_QC[mask_QC] = logit_N
    label_QC = torch.zeros_like(logit_QC)
    label_QC[mask_QC] = label_N
    some_Q = label_QC.any(dim=1)
    order = weight_Q[some_Q] * _order(logit_QC[some_Q], label_QC[some_Q], mask_QC[some_Q])
    level = F.binary_cross_entropy_with_logits(logit_N, label_N, weight_Q[query_N])
    return order.sum() / len(weight_Q) + _LEVEL_WEIGHT * level


def _order(logit_QC: Tensor, label_QC: Tensor, mask_QC: Tensor) -> Tensor:
    """Softmax loss and swaps of each list [Q], which has a relevant row; what is outside `mask_QC` is no row."""
    target_QC = label_QC / label_QC.sum(dim=1, keepdim=True)
    softmax_Q = -(target_QC * torch.log_softmax(logit_QC, dim=1)).sum(dim=1)
    return softmax_Q + _SWAP_WEIGHT * _swaps(logit_QC, label_QC, mask_QC)


def _swaps(logit_QC: Tensor, label_QC: Tensor, mask_QC: Tensor) -> Tensor:
    """Sum per list [Q] of log(1 + exp(other - relevant)), weighted by what swapping the two would change in NDCG."""
    with torch.no_grad():
        place_QC = logit_QC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        worth_QC = torch.where(place_QC < _SWAP_PLACES, 1.0 / torch.log2(place_QC + 2.0), 0.0)
        ideal = torch.cumsum(1.0 / torch.log2(torch.arange(2.0, _IDEAL_PLACES + 2.0)), dim=0)
        ideal_Q = ideal[(label_QC.sum(dim=1).long() - 1).clamp(0, _IDEAL_PLACES - 1)]
        query, at = torch.nonzero(label_QC, as_tuple=True)  # R relevant rows: few, so pairs are made of them only
        change_RC = (worth_QC[query, at][:, None] - worth_QC[query]).abs() / ideal_Q[query][:, None]
        change_RC *= mask_QC[query] & (label_QC[query] == 0)
    behind_RC = F.softplus(logit_QC[query] - logit_QC[query, at][:, None])
    return logit_QC.new_zeros(len(label_QC)).index_add(0, query, (change_RC * behind_RC).sum(dim=1))
