"""The ranker: features of a user, an item and both, to the chances of what the user may do with the item.

A linear and a deep part over the scaled features; beside them the candidate's embedding meets the mean embedding of the
user's history (both TorchRec bags) in one inner product. One head, the target's, gives the order; every other behaviour
has a head of its own over the same inputs and hidden layer (shared bottom), which says how its logit differs from the
target's and costs nothing where nobody asks for it. Each output is a logit, calibrated (Platt) on the validation
window: its sigmoid is a probability.

Shape legend: Q users (queries), N candidates of all queries, F features, X network inputs, H hidden units, B behaviours
that have a head beside the target's.
Source: Cheng et al. 2016 (Wide & Deep); Zhou et al. 2018 (DIN: history meets candidate); Caruana 1997 (shared bottom);
Platt 1999.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core import BadInput, RunDirectory, VersionMismatch
from recsys.core.metrics import MISSING_FEATURES
from recsys.models import storage
from recsys.models.config import RankerConfig
from recsys.models.embeddings import Vocabulary, bag_tables
from recsys.models.history import Histories
from recsys.models.jagged import Jagged, keyed
from recsys.models.scaling import Scaling

NEW_ONLY = "new_only"  # the feature that is 1 where new items alone were asked for


class RankerNet(nn.Module):
    """The weights of the ranker. `scaling` is fitted before training and fixed afterwards."""

    def __init__(self, num_features: int, num_rows: int, config: RankerConfig, num_others: int = 0) -> None:
        """num_rows: rows of the item table; num_others: heads beside the target's."""
        super().__init__()
        self.scaling = Scaling(num_features, config.quantiles, config.bins)
        self.tables = bag_tables({"item": num_rows}, config.dim, {"item": ["candidate", "history"]})
        self.first = nn.Linear(self.scaling.num_outputs, 1 + config.hidden)
        self.meeting = nn.Linear(1, config.hidden, bias=False)
        self.bend = nn.Sequential(nn.GELU(), nn.Dropout(config.dropout))
        self.last = nn.Linear(config.hidden, 1)
        # begun at 0 without a draw, so that the target's weights and dropout are the same with any number of heads
        self.others_wide = nn.Parameter(torch.zeros(num_others, self.scaling.num_outputs))
        self.others_deep = nn.Parameter(torch.zeros(num_others, config.hidden))
        self.others_level = nn.Parameter(torch.zeros(num_others))

    def forward(self, x_NX: Tensor, ids: KeyedJaggedTensor, query_N: Tensor) -> Tensor:
        """Logits of the target [N].

        x_NX: what `scaling` gives; ids: from `Ranker.ids`; query_N: each candidate's history.
        """
        return self._target(x_NX, ids, query_N)[0]

    def every(self, x_NX: Tensor, ids: KeyedJaggedTensor, query_N: Tensor, share: float = 0.0) -> tuple[Tensor, Tensor]:
        """Logits of the target [N] and of the other behaviours [N, B].

        share: of the other heads' gradients that reaches the hidden layer.
        """
        logit_N, hidden_NH = self._target(x_NX, ids, query_N)
        common_NH = torch.lerp(hidden_NH.detach(), hidden_NH, share)
        differs_NB = F.linear(x_NX, self.others_wide, self.others_level) + F.linear(common_NH, self.others_deep)
        return logit_N, logit_N.detach()[:, None] + differs_NB  # rare behaviours have too little to learn all from

    def _target(self, x_NX: Tensor, ids: KeyedJaggedTensor, query_N: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N] and the hidden layer [N, H]."""
        bags = self.tables(ids)
        met_N1 = (bags["candidate"][: len(query_N)] * bags["history"][query_N]).sum(dim=1, keepdim=True)
        wide_N1, deep_NH = self.first(x_NX).split([1, self.meeting.out_features], dim=1)  # one product for both parts
        hidden_NH: Tensor = self.bend(deep_NH + self.meeting(met_N1))
        return (wide_N1 + self.last(hidden_NH)).squeeze(1), hidden_NH


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling: calibrated logit = slope * logit + intercept; slope > 0 keeps the order."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, logit: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Calibrated logits, of any shape."""
        calibrated: npt.NDArray[np.float32] = self.slope * logit + self.intercept
        return calibrated


@dataclass(frozen=True, slots=True)
class Head:
    """What an output of the network foresees, an event type's label or a word for several, and its calibration."""

    foresees: str
    calibration: Calibration = field(default_factory=Calibration)


_TARGET_ALONE = (Head("any"),)


@dataclass(frozen=True, slots=True)
class Prior:
    """An order to lean on where training saw little, or another kind of day: added to the logit.

    source: whose order, by the feature SOURCE_score. What is added is the weight times the worth of the place in NDCG,
    1 / log2(1 + place), nothing where the source is silent. Places mean the same on every day, scores do not.
    fresh_weight: instead of `weight` where new items alone were asked for, which have the first places then.
    among: a feature; only rows where it is above 0 have places. Empty = all rows.
    """

    source: str
    weight: float
    fresh_weight: float = 0.0
    among: str = ""

    @property
    def features(self) -> tuple[str, ...]:
        """The columns it reads."""
        return (f"{self.source}_score", self.among) if self.among else (f"{self.source}_score",)

    def worth(
        self, values: npt.NDArray[np.float32], names: Sequence[str], query: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """1 / log2(1 + place) of each row by score among the rows of its query [N], 0 where the score is missing.

        values: [N, F] with columns `names`, all of `features` among them. query: ascending.
        """
        score, *among = (values[:, names.index(feature)] for feature in self.features)
        for above_0 in among:
            score = np.where(above_0 > 0, score, np.float32(np.nan))
        order = np.lexsort((-score, query))
        place = np.empty(len(score), np.float32)
        place[order] = np.arange(len(score)) - np.searchsorted(query, query)
        return np.where(np.isfinite(score), 1.0 / np.log2(2.0 + place), 0.0).astype(np.float32)


class Ranker:
    """A trained ranker, as serving uses it. heads: the target's, whose logits are the score, then the others'."""

    def __init__(
        self,
        net: RankerNet,
        feature_names: Sequence[str],
        vocabulary: Vocabulary,
        config: RankerConfig,
        priors: Sequence[Prior] = (),
        heads: Sequence[Head] = _TARGET_ALONE,
        version: str = "unsaved",
    ) -> None:
        """Use `load`, or training. heads: as many as the network has."""
        self.net, self.vocabulary, self.config, self.version = net, vocabulary, config, version
        self.feature_names = tuple(feature_names)
        self.priors, self.heads = tuple(priors), tuple(heads)

    @classmethod
    def load(cls, run: RunDirectory) -> Ranker:
        """The ranker of a run. Raises: NotFound, CorruptData, VersionMismatch."""
        stored = storage.load(run, "ranker")
        with run.settings_of("model ranker"):
            names, config = tuple(stored.settings["feature_names"]), RankerConfig(**stored.settings["config"])
            priors = [Prior(**prior) for prior in stored.settings["priors"]]
            heads = [Head(h["foresees"], Calibration(**h["calibration"])) for h in stored.settings["heads"]]
            vocabulary = Vocabulary(stored.tensors["items.key"].numpy())
        net = RankerNet(len(names), vocabulary.num_rows, config, len(heads) - 1)
        storage.restore(net, stored.section("net"), f"run {run.run_id}, models/ranker.safetensors")
        return cls(net, names, vocabulary, config, priors, heads, stored.version)

    def save(self, folder: Path) -> None:
        """Write ranker.safetensors and ranker.json into `folder`."""
        tensors = {f"net.{n}": t for n, t in self.net.state_dict().items()}
        tensors["items.key"] = storage.keys_tensor(self.vocabulary.keys)
        settings = {
            "config": asdict(self.config),
            "feature_names": list(self.feature_names),
            "defaults": dict.fromkeys(self.feature_names),  # null: a missing value is an input of its own
            "priors": [asdict(prior) for prior in self.priors],
            "heads": [asdict(head) for head in self.heads],
        }
        self.version = storage.save(folder, "ranker", settings, tensors)

    def ids(self, item_key: npt.NDArray[np.int64], histories: Histories) -> KeyedJaggedTensor:
        """Features of N candidates and Q histories, max(N, Q) lists each: the shorter one is filled up with empty."""
        used = histories.last(self.config.history_items_max)
        num_lists = max(len(item_key), len(used.lengths))
        candidate = np.zeros(num_lists, np.int32)
        candidate[: len(item_key)] = 1
        history = np.zeros(num_lists, np.int32)
        history[: len(used.lengths)] = used.lengths
        rows = self.vocabulary.rows
        return keyed({"candidate": Jagged(rows(item_key), candidate), "history": Jagged(rows(used.item_key), history)})

    def score(
        self,
        values: npt.NDArray[np.float32],
        names: Sequence[str],
        item_key: npt.NDArray[np.int64],
        history_keys: npt.NDArray[np.int64],
        history_types: npt.NDArray[np.int8],
        history_times_us: npt.NDArray[np.int64],
        as_of_us: int,
    ) -> npt.NDArray[np.float32]:
        """Calibrated logits [N] of one user's candidates, the target's; sigmoid of them is a probability.

        values: [N, F'] with columns `names`, NaN = missing. A feature the model knows and `names` lacks counts as
        missing, and in double11_missing_features_total.
        Raises: BadInput for values of another shape; VersionMismatch when no name is the model's.
        """
        history = (history_keys, history_types, history_times_us, as_of_us)
        return self.heads[0].calibration(self._of_user(self.logits, values, names, item_key, history))

    def probabilities(
        self,
        values: npt.NDArray[np.float32],
        names: Sequence[str],
        item_key: npt.NDArray[np.int64],
        history_keys: npt.NDArray[np.int64],
        history_types: npt.NDArray[np.int8],
        history_times_us: npt.NDArray[np.int64],
        as_of_us: int,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """What each head foresees to its chances [N] for one user's candidates, the target's first.

        A chance is that of a shopper who comes back within a training window's length from `as_of_us` on, for items
        such as the sources find. Arguments, counters and errors as for `score`, whose sigmoid the target's chance is.
        """
        history = (history_keys, history_types, history_times_us, as_of_us)
        logit = self._of_user(self.every_logit, values, names, item_key, history)
        if not len(logit):
            return {head.foresees: logit for head in self.heads}
        chances = {h.foresees: h.calibration(column) for h, column in zip(self.heads, logit.T, strict=True)}
        return {name: torch.from_numpy(chance).sigmoid().numpy() for name, chance in chances.items()}

    def leaning(self, values: npt.NDArray[np.float32], query: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What the priors add to the logits [N]; query: each candidate's user, ascending."""
        added, fresh = np.zeros(len(values), np.float32), np.zeros(len(values), np.bool_)
        if NEW_ONLY in self.feature_names:
            fresh = values[:, self.feature_names.index(NEW_ONLY)] > 0
        for prior in self.priors:
            weight = np.where(fresh, prior.fresh_weight, prior.weight).astype(np.float32)
            added += weight * prior.worth(values, self.feature_names, query)
        return added

    @torch.inference_mode()
    def logits(
        self,
        values: npt.NDArray[np.float32],
        item_key: npt.NDArray[np.int64],
        histories: Histories,
        query: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """What the target's head alone says of N candidates of Q users [N]; query: each candidate's user.

        values: [N, F] in the order of `feature_names`.
        """
        x_NX = self.net.scaling(torch.from_numpy(values))
        logit: npt.NDArray[np.float32] = self.net(x_NX, self.ids(item_key, histories), torch.from_numpy(query)).numpy()
        return logit

    @torch.inference_mode()
    def every_logit(
        self,
        values: npt.NDArray[np.float32],
        item_key: npt.NDArray[np.int64],
        histories: Histories,
        query: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """What every head alone says [N, 1 + B], in the order of `heads`; arguments as for `logits`."""
        x_NX = self.net.scaling(torch.from_numpy(values))
        target_N, others_NB = self.net.every(x_NX, self.ids(item_key, histories), torch.from_numpy(query))
        logit: npt.NDArray[np.float32] = torch.cat([target_N[:, None], others_NB], dim=1).numpy()
        return logit

    def _of_user(
        self,
        logits: Callable[..., npt.NDArray[np.float32]],
        values: npt.NDArray[np.float32],
        names: Sequence[str],
        item_key: npt.NDArray[np.int64],
        history: tuple[npt.NDArray[np.int64], npt.NDArray[np.int8], npt.NDArray[np.int64], int],
    ) -> npt.NDArray[np.float32]:
        """What `logits` or `every_logit` says of one user's candidates, the priors added to the target's; [0] for none.

        history: keys, types, times of the user's actions, and as of when.
        """
        if values.shape != (len(item_key), len(names)):
            raise BadInput(
                "ranker features",
                came=f"shape {values.shape}",
                expected=f"({len(item_key)}, {len(names)}): one row per candidate, one column per name",
                fix="Pass the matrix with its own names.",
            )
        item, kind, time_us, as_of_us = history
        one = Histories.from_lists([item], [kind], [time_us], [as_of_us])
        if not len(item_key):
            return np.empty(0, np.float32)
        values = self._in_order(values, names)
        query = np.zeros(len(item_key), np.int64)
        logit = logits(values, item_key, one, query)
        target = logit if logit.ndim == 1 else logit[:, 0]
        target += self.leaning(values, query)
        return logit

    def _in_order(self, values: npt.NDArray[np.float32], names: Sequence[str]) -> npt.NDArray[np.float32]:
        if tuple(names) == self.feature_names:
            return np.ascontiguousarray(values, np.float32)
        place = {n: i for i, n in enumerate(names)}
        missing = [n for n in self.feature_names if n not in place]
        if len(missing) == len(self.feature_names):
            raise VersionMismatch(
                "ranker features",
                came=", ".join(names) or "none",
                expected=", ".join(self.feature_names),
                fix="Serve the run with the release that trained it, or train again.",
            )
        for name in missing:
            MISSING_FEATURES.labels(feature=name).inc(len(values))
        ordered = np.full((len(values), len(self.feature_names)), np.nan, np.float32)
        for i, name in enumerate(self.feature_names):
            if name in place:
                ordered[:, i] = values[:, place[name]]
        return ordered
