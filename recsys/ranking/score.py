"""The in-process scorer: a ranker behind the Scorer protocol."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.core import Candidates, Deadline, Query, VersionMismatch
from recsys.ranking.base import FeatureMatrix
from recsys.ranking.features import FEATURE_NAMES


class RankerModel(Protocol):
    """What a ranker offers; `recsys.models.ranker.Ranker` is one."""

    @property
    def version(self) -> str:
        """Version for the response."""
        ...

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Features it was trained on."""
        ...

    def score(
        self,
        values: npt.NDArray[np.float32],
        names: tuple[str, ...],
        item_key: npt.NDArray[np.int64],
        history_keys: npt.NDArray[np.int64],
        history_types: npt.NDArray[np.int8],
        history_times_us: npt.NDArray[np.int64],
        as_of_us: int,
    ) -> npt.NDArray[np.float32]:
        """Logits [N] for values [N, F] and a history of [L] actions, oldest first."""
        ...


class LocalScorer:
    """Implements Scorer with a ranker in this process."""

    def __init__(self, ranker: RankerModel) -> None:
        """Raises: VersionMismatch when the ranker was trained on features that `assemble` does not make."""
        unknown = sorted(set(ranker.feature_names) - set(FEATURE_NAMES))
        if unknown:
            raise VersionMismatch(
                f"ranker {ranker.version}, features",
                came=", ".join(unknown),
                expected="names in recsys.ranking.features.FEATURE_NAMES",
                fix="Train again with this release, or serve the run with the release that trained it.",
            )
        self._ranker = ranker

    @property
    def version(self) -> str:
        """The ranker's."""
        return self._ranker.version

    async def score(
        self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix, deadline: Deadline
    ) -> npt.NDArray[np.float32]:
        """Logits [N]. Raises: DeadlineExceeded when no time is left on arrival."""
        deadline.require("ranker")
        return self._ranker.score(
            features.values,
            features.names,
            found.item_key,
            user.recent_item_key,
            user.recent_event_type,
            user.recent_time_us,
            query.as_of_us,
        )
