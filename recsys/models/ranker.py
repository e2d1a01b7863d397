"""The ranker: features of a user, an item and both, to the chance that the user acts on the item.

A linear and a deep part over the scaled features; beside them the candidate's embedding meets the mean embedding of the
user's history (both TorchRec bags) in one inner product. The output is a logit, calibrated (Platt) on the validation
window: sigmoid(score) is a probability.

Shape legend: Q users (queries), N candidates of all queries, F features, X network inputs.
Source: Cheng et al. 2016 (Wide & Deep); Zhou et al. 2018 (DIN: history meets candidate); Platt 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
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

    def __init__(self, num_features: int, num_rows: int, config: RankerConfig) -> None:
        """num_rows: rows of the item table."""
        super().__init__()
        self.scaling = Scaling(num_features, config.quantiles, config.bins)
        self.tables = bag_tables({"item": num_rows}, config.dim, {"item": ["candidate", "history"]})
        self.first = nn.Linear(self.scaling.num_outputs, 1 + config.hidden)
        self.meeting = nn.Linear(1, config.hidden, bias=False)
        self.last = nn.Sequential(nn.GELU(), nn.Dropout(config.dropout), nn.Linear(config.hidden, 1))

    def forward(self, x_NX: Tensor, ids: KeyedJaggedTensor, query_N: Tensor) -> Tensor:
        """Logits [N]. x_NX: what `scaling` gives; ids: from `Ranker.ids`; query_N: each candidate's history."""
        bags = self.tables(ids)
        met_N1 = (bags["candidate"][: len(query_N)] * bags["history"][query_N]).sum(dim=1, keepdim=True)
        wide_N1, deep_NH = self.first(x_NX).split([1, self.meeting.out_features], dim=1)  # one product for both parts
        logit_N1: Tensor = wide_N1 + self.last(deep_NH + self.meeting(met_N1))
        return logit_N1.squeeze(1)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling: calibrated logit = slope * logit + intercept; slope > 0 keeps the order."""

    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True, slots=True)
class Prior:
    """An order to lean on where training saw little, or another kind of day: added to the logit.

    source: whose order, by the feature SOURCE_score. What is added is the weight times the worth of the place in NDCG,
    1 / log2(1 + place), nothing where the source is silent. Places mean the same on every day, scores do not.
    fresh_weight: instead of `weight` where new items alone were asked for, which have the first places then.
    """

    source: str
    weight: float
    fresh_weight: float = 0.0

    @property
    def feature(self) -> str:
        """The column it reads."""
        return f"{self.source}_score"

    def worth(self, score: npt.NDArray[np.float32], query: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """1 / log2(1 + place) of each row by score among the rows of its query [N], 0 where the score is missing.

        query: ascending.
        """
        order = np.lexsort((-score, query))
        place = np.empty(len(score), np.float32)
        place[order] = np.arange(len(score)) - np.searchsorted(query, query)
        return np.where(np.isfinite(score), 1.0 / np.log2(2.0 + place), 0.0).astype(np.float32)


class Ranker:
    """A trained ranker, as serving uses it."""

    def __init__(
        self,
        net: RankerNet,
        feature_names: Sequence[str],
        vocabulary: Vocabulary,
        config: RankerConfig,
        priors: Sequence[Prior] = (),
        calibration: Calibration | None = None,
        version: str = "unsaved",
    ) -> None:
        """Use `load`, or training."""
        self.net, self.vocabulary, self.config, self.version = net, vocabulary, config, version
        self.feature_names = tuple(feature_names)
        self.priors, self.calibration = tuple(priors), calibration or Calibration()

    @classmethod
    def load(cls, run: RunDirectory) -> Ranker:
        """The ranker of a run. Raises: NotFound, CorruptData, VersionMismatch."""
        stored = storage.load(run, "ranker")
        with run.settings_of("model ranker"):
            names, config = tuple(stored.settings["feature_names"]), RankerConfig(**stored.settings["config"])
            priors = [Prior(**prior) for prior in stored.settings["priors"]]
            calibration = Calibration(**stored.settings["calibration"])
            vocabulary = Vocabulary(stored.tensors["items.key"].numpy())
        net = RankerNet(len(names), vocabulary.num_rows, config)
        storage.restore(net, stored.section("net"), f"run {run.run_id}, models/ranker.safetensors")
        return cls(net, names, vocabulary, config, priors, calibration, stored.version)

    def save(self, folder: Path) -> None:
        """Write ranker.safetensors and ranker.json into `folder`."""
        tensors = {f"net.{n}": t for n, t in self.net.state_dict().items()}
        tensors["items.key"] = storage.keys_tensor(self.vocabulary.keys)
        settings = {
            "config": asdict(self.config),
            "feature_names": list(self.feature_names),
            "defaults": dict.fromkeys(self.feature_names),  # null: a missing value is an input of its own
            "priors": [asdict(prior) for prior in self.priors],
            "calibration": asdict(self.calibration),
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
        """Calibrated logits [N] of one user's candidates; sigmoid of them is a probability.

        values: [N, F'] with columns `names`, NaN = missing. A feature the model knows and `names` lacks counts as
        missing, and in double11_missing_features_total.
        Raises: BadInput for values of another shape; VersionMismatch when no name is the model's.
        """
        if values.shape != (len(item_key), len(names)):
            raise BadInput(
                "ranker features",
                came=f"shape {values.shape}",
                expected=f"({len(item_key)}, {len(names)}): one row per candidate, one column per name",
                fix="Pass the matrix with its own names.",
            )
        one = Histories.from_lists([history_keys], [history_types], [history_times_us], [as_of_us])
        if not len(item_key):
            return np.empty(0, np.float32)
        values = self._in_order(values, names)
        query = np.zeros(len(item_key), np.int64)
        logit = self.logits(values, item_key, one, query) + self.leaning(values, query)
        scores: npt.NDArray[np.float32] = self.calibration.slope * logit + self.calibration.intercept
        return scores

    def leaning(self, values: npt.NDArray[np.float32], query: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What the priors add to the logits [N]; query: each candidate's user, ascending."""
        added, fresh = np.zeros(len(values), np.float32), np.zeros(len(values), np.bool_)
        if NEW_ONLY in self.feature_names:
            fresh = values[:, self.feature_names.index(NEW_ONLY)] > 0
        for prior in self.priors:
            weight = np.where(fresh, prior.fresh_weight, prior.weight).astype(np.float32)
            added += weight * prior.worth(values[:, self.feature_names.index(prior.feature)], query)
        return added

    @torch.inference_mode()
    def logits(
        self,
        values: npt.NDArray[np.float32],
        item_key: npt.NDArray[np.int64],
        histories: Histories,
        query: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """What the network alone says of N candidates of Q users [N]; query: each candidate's user.

        values: [N, F] in the order of `feature_names`.
        """
        x_NX = self.net.scaling(torch.from_numpy(values))
        logit: npt.NDArray[np.float32] = self.net(x_NX, self.ids(item_key, histories), torch.from_numpy(query)).numpy()
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
