"""What the four kinds of ranking stage promise. Shape legend: N candidates, F features, K slate places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.core import Candidates, Deadline, Query


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMatrix:
    """Model inputs for N candidates. values: float32 [N, F], NaN = missing; names: F feature names."""

    names: tuple[str, ...]
    values: npt.NDArray[np.float32]

    def column(self, name: str) -> npt.NDArray[np.float32]:
        """One feature [N]. Raises KeyError for a name it does not have."""
        if name not in self.names:
            raise KeyError(name)
        return self.values[:, self.names.index(name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """rows: int64 [K], candidate rows in slate order. propensity: float32 [K], chance of each at its place."""

    rows: npt.NDArray[np.int64]
    propensity: npt.NDArray[np.float32]


class Hydrator(Protocol):
    """Adds fields: reads item features and assembles the model inputs."""

    async def hydrate(self, query: Query, user: UserFeatures, found: Candidates, deadline: Deadline) -> FeatureMatrix:
        """Features of every candidate, in the candidates' order."""
        ...


class Filter(Protocol):
    """Removes candidates that must not be shown."""

    @property
    def name(self) -> str:
        """The name in metrics, e.g. "sold_out"."""
        ...

    def keep(
        self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix | None
    ) -> npt.NDArray[np.bool_]:
        """True [N] for what may stay. features is None on tiers that did not hydrate."""
        ...


class Scorer(Protocol):
    """Adds a number per candidate."""

    @property
    def version(self) -> str:
        """Model version for the response."""
        ...

    async def score(
        self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix, deadline: Deadline
    ) -> npt.NDArray[np.float32]:
        """Scores [N], higher is better, all finite.

        Raises: DeadlineExceeded, Unavailable, VersionMismatch (features the model was not trained on).
        """
        ...


class Selector(Protocol):
    """Orders and cuts."""

    def select(self, query: Query, found: Candidates, score: npt.NDArray[np.float32], limit: int) -> Selection:
        """At most `limit` rows. Non-finite scores sink to the end; ties are broken by item_key."""
        ...
