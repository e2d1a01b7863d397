"""lambdamart: LightGBM on the very lists and features that `rank` was trained on; the honest peer of the ranker.

Shape legend: N candidates, F features.
Source: Burges, "From RankNet to LambdaRank to LambdaMART" (MSR-TR-2010-82); https://lightgbm.readthedocs.io.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_store import UserFeatures
from recsys.core import Candidates, Deadline, Query, RunDirectory
from recsys.data import Dataset
from recsys.ranking import FeatureMatrix
from recsys.replay.peers.base import package
from recsys.training.lists import foreseen, window_lists, window_starts
from recsys.training.rank_lists import RankLists
from recsys.training.settings import Settings

ROUNDS_MAX = 600
PATIENCE = 50
TREES: dict[str, Any] = {
    "objective": "lambdarank",
    "metric": "ndcg",
    "eval_at": [10],
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 1.0,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}


class LambdaMartScorer:
    """Implements Scorer with a LightGBM booster in this process."""

    version = "lambdamart"

    def __init__(self, booster: Any, names: Sequence[str]) -> None:
        """names: the features it was fitted on, in order."""
        self._booster, self._names = booster, tuple(names)

    async def score(
        self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix, deadline: Deadline
    ) -> npt.NDArray[np.float32]:
        """Scores [N]. Raises: DeadlineExceeded when no time is left on arrival."""
        deadline.require("lambdamart")
        values = features.values
        if features.names != self._names:
            values = np.stack([features.column(n) for n in self._names], axis=1)
        return np.asarray(self._booster.predict(values, num_threads=1), np.float32)


def fit(dataset: Dataset, run: RunDirectory, seed: int) -> LambdaMartScorer:
    """Fitted on the run's own training lists: those beside it in RUN.work where they are, else made again there."""
    settings = Settings.from_dict(run.manifest["config"])
    windows = window_starts(dataset, run.until_us, settings)
    lists = window_lists(
        dataset,
        windows,
        foreseen(dataset, windows, settings.training),
        seed=int(run.manifest["seed"]),
        settings=settings,
        work=run.work,
    )
    return LambdaMartScorer(train(lists, seed), lists[0].names)


def train(lists: Sequence[RankLists], seed: int) -> Any:
    """A booster; as many trees as are best on the last window when fitted on the others, then fitted on all."""
    lightgbm = package("lightgbm")
    options = TREES | {"seed": seed}
    *earlier, last = lists
    rounds = ROUNDS_MAX // 3
    if earlier:
        stop = lightgbm.early_stopping(PATIENCE, verbose=False)
        fitted = _data(RankLists.concat(earlier))
        judged = lightgbm.train(options, fitted, ROUNDS_MAX, valid_sets=[_data(last, fitted)], callbacks=[stop])
        rounds = max(judged.best_iteration, 10)
    return lightgbm.train(options, _data(RankLists.concat(lists)), rounds)


def _data(lists: RankLists, reference: Any = None) -> Any:
    return package("lightgbm").Dataset(
        lists.values, lists.label.astype(np.int8), group=np.diff(lists.offsets), feature_name=list(lists.names),
        reference=reference, free_raw_data=False,
    )  # fmt: skip
