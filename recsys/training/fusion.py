"""Learns how much each source counts in the retrieval tier's order, from what users of past windows acted on.

A linear model with weights of at least 0: softmax cross-entropy of each list's relevant candidates, by task. Around the
weights of the arm's feeds there is a prior, so that few lists change little. The problem is convex and small; Newton's
steps solve it. Then the user's own history counts for as much as these lists allow: what shoppers did before carries
over to days that are unlike those learnt from, and what else was learnt need not.

Shape legend: Q lists with a relevant candidate, N candidates of all of them, S sources.
Source: Cao et al. 2007 (ListNet, top-one softmax).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.candidates.fusion import Fusion, worth
from recsys.pipeline import Feed
from recsys.training.rank_lists import RankLists
from recsys.training.validation import as_good, ndcg, recall

_SPREAD = 2.0  # of a weight in logits, in feed weights, before anything was seen
_LEVELS = 2.0 ** np.arange(-4, 7)  # what a score may be worth in logits
_LASTS = "own_history"
_RAISED = (0.5, 1.0, 2.0, 4.0, 8.0)  # what it may count at least, in its feed's weight
_FOUND = 100  # places that the tiers after this one can use
_STEPS_MAX, _SWEEPS, _HALVINGS = 30, 200, 20
_ENOUGH = 1e-6  # of the loss: a step that gains less is the last
Floats = npt.NDArray[np.float64]


def learn_fusion(parts: Sequence[RankLists], feeds: Sequence[Feed]) -> Fusion:
    """Weights of `feeds` for either task, those of the feeds where no list has a hit.

    They are as much in sum as theirs before own history is raised.
    """
    lists = RankLists.concat(parts)
    return Fusion(*(_weights(lists.of_task(new_only=new_only), feeds) for new_only in (False, True)))


def _weights(lists: RankLists, feeds: Sequence[Feed]) -> dict[str, float]:
    own = {f.source: f.weight for f in feeds}
    asked = [f for f in feeds if f"{f.source}_score" in lists.names and f.weight > 0]
    if not lists.label.any() or not asked:
        return own
    lists = lists.where(np.bincount(lists.query_of_row(), lists.label, len(lists)) > 0)
    data = _Data.of(lists, asked)
    usual = np.array([f.weight for f in asked])
    level = min(_LEVELS, key=lambda level: data.loss(level * usual))
    learnt = _newton(data, level * usual, 1.0 / (_SPREAD * usual) ** 2)
    learnt *= sum(own[f.source] for f in asked) / learnt.sum()
    if _LASTS in (names := [f.source for f in asked]):
        learnt = _raised(lists, data, learnt, names.index(_LASTS), own[_LASTS])
    return own | {f.source: float(w) for f, w in zip(asked, learnt, strict=True)}


def _raised(lists: RankLists, data: _Data, learnt: Floats, place: int, usual: float) -> Floats:
    """`learnt`, but the source at `place`, where it says something, counts the most of _RAISED that does no harm.

    That is: within one standard error of the best in the first places as well as in what is found.
    """
    if not data.said[:, place].any():
        return learnt
    ways: Floats = np.tile(learnt, (1 + len(_RAISED), 1))
    ways[1:, place] = np.maximum(learnt[place], usual * np.array(_RAISED))
    scores = [(data.said @ way).astype(np.float32) for way in ways]
    first = as_good(np.stack([ndcg(lists, score) for score in scores]))
    found = as_good(np.stack([recall(lists, score, _FOUND) for score in scores]))
    chosen: Floats = ways[max(np.flatnonzero(first & found), default=0)]
    return chosen


@dataclass(frozen=True, slots=True)
class _Data:
    """said: what `fuse` multiplies with the weights [N, S]; start: first row of each list [Q]; query: list of each row.

    wanted: the mean of `said` over each list's relevant rows, summed over lists [S].
    """

    said: Floats
    start: npt.NDArray[np.int64]
    query: npt.NDArray[np.int64]
    wanted: Floats

    @classmethod
    def of(cls, lists: RankLists, feeds: Sequence[Feed]) -> _Data:
        """Of lists that have a relevant candidate each."""
        columns = [lists.names.index(f"{feed.source}_score") for feed in feeds]
        said, wanted = [], np.zeros(len(feeds))
        for start, stop in itertools.pairwise(lists.offsets):
            scores = lists.values[start:stop, columns].T
            said.append(np.stack([worth(s, f.absolute) for f, s in zip(feeds, scores, strict=True)], axis=1))
            wanted += said[-1][lists.label[start:stop]].mean(axis=0)
        return cls(np.concatenate(said), lists.offsets[:-1], lists.query_of_row(), wanted)

    def loss(self, weight: Floats) -> float:
        """Sum over lists of the mean of -log softmax over the relevant rows."""
        return float(self._chances(weight)[1].sum() - self.wanted @ weight)

    def slopes(self, weight: Floats) -> tuple[Floats, Floats]:
        """Gradient [S] and Hessian [S, S] of the loss."""
        chance, _ = self._chances(weight)
        expected = np.add.reduceat(chance[:, None] * self.said, self.start)
        hessian = (chance[:, None] * self.said).T @ self.said - expected.T @ expected
        return expected.sum(axis=0) - self.wanted, hessian

    def _chances(self, weight: Floats) -> tuple[Floats, Floats]:
        """Softmax of each row within its list [N], and the log of its denominator [Q]."""
        score = self.said @ weight
        highest = np.maximum.reduceat(score, self.start)
        grown = np.exp(score - highest[self.query])
        total = np.add.reduceat(grown, self.start)
        return grown / total[self.query], np.log(total) + highest


def _newton(data: _Data, usual: Floats, sure: Floats) -> Floats:
    """Weights >= 0 of least loss plus surprise, half of the sum of sure * (weight - usual)^2."""

    def total(weight: Floats) -> float:
        return data.loss(weight) + float((sure * (weight - usual) ** 2).sum()) / 2

    weight, before = usual, total(usual)
    for _ in range(_STEPS_MAX):
        gradient, hessian = data.slopes(weight)
        step = _bounded(hessian + np.diag(sure), gradient + sure * (weight - usual), weight) - weight
        for halving in range(_HALVINGS):
            tried = weight + step / 2**halving
            if (after := total(tried)) < before:
                break
        else:
            return weight
        weight, gained, before = tried, before - after, after
        if gained < _ENOUGH * abs(before):
            break
    return weight


def _bounded(hessian: Floats, gradient: Floats, at: Floats) -> Floats:
    """Where the quadratic with these slopes at `at` is least among weights >= 0, by coordinate descent."""
    weight, slope = at.copy(), gradient.copy()
    for _ in range(_SWEEPS):
        for i in range(len(weight)):
            moved = max(weight[i] - slope[i] / hessian[i, i], 0.0) - weight[i]
            weight[i] += moved
            slope += moved * hessian[i]
    return weight
