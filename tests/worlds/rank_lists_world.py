"""Made-up training lists of a ranker."""

import numpy as np
import pyarrow as pa

from recsys.core import keys
from recsys.core.items import ItemTable
from recsys.models.history import Histories
from recsys.training.rank_lists import RankLists, bit_of

ITEMS = ItemTable.from_table(
    pa.table({"item_id": [f"i{n}" for n in range(40)], "item_key": keys([f"i{n}" for n in range(40)])})
)


def make_lists(queries=60, seed=0):
    """Lists of 20 whose label follows the second feature; the first is own history, the third noise to the label.

    What is high in the third is viewed, bought or not. Every third list is of task new-only.
    """
    rng = np.random.default_rng(seed)
    rows = queries * 20
    values = rng.normal(size=(rows, 3)).astype(np.float32)
    label = np.zeros((queries, 20), bool)
    label[np.arange(queries), values[:, 1].reshape(queries, 20).argmax(axis=1)] = True
    values[rng.random(values.shape) < 0.1] = np.nan
    history = [keys([f"i{rng.integers(40)}"]) for _ in range(queries)]
    return RankLists(
        names=("own_history_score", "good", "noise"),
        source_names=("own_history",),
        values=values,
        label=label.ravel(),
        acted=(label.ravel() * bit_of("purchase") + (np.nan_to_num(values[:, 2]) > 1) * bit_of("view")).astype(
            np.uint8
        ),
        item_key=np.concatenate([rng.permutation(ITEMS.item_key)[:20] for _ in range(queries)]),
        source=np.zeros(rows, np.int64),
        retrieval_score=values[:, 2],
        offsets=np.arange(queries + 1) * 20,
        num_relevant=np.ones(queries, np.int64),
        new_only=np.arange(queries) % 3 == 2,
        user_id=tuple(f"u{q}" for q in range(queries)),
        histories=Histories.from_lists(
            history, [np.array([5], np.int8)] * queries, [np.array([1])] * queries, [10] * queries
        ),
    )
