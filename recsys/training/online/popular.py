"""The popular list of a run, going on: what the last tier answers with, and what fills short slates."""

from __future__ import annotations

import numpy as np

from recsys.candidates import popular
from recsys.candidates.ranked_list import EVERYBODY, read_half_life_us
from recsys.core import RunDirectory
from recsys.core.index_rows import IndexRows
from recsys.training.online.index import Keys, joined, rows_of_table
from recsys.training.online.rates import OnlineRates


class OnlinePopular(OnlineRates):
    """One row, the list."""

    NAME, FILE = popular.NAME, f"index/{popular.RATES}.parquet"

    def __init__(self, run: RunDirectory, rows_max: int, users_max: int) -> None:
        """As OnlineRates."""
        half_life_us = {"interest": read_half_life_us(run.path(self.FILE))}
        super().__init__(run, rows_max, users_max, popular.RATES_SCHEMA, half_life_us)

    def _rows_of(self, item_key: Keys) -> Keys:
        return np.full(min(len(item_key), 1), EVERYBODY, np.int64)

    def _made(self, wanted: Keys) -> IndexRows:
        if not len(wanted):
            return joined([])
        table = popular.best(self.now())
        item_key, score = table.column("item_key").to_numpy(), table.column("score").to_numpy()
        return rows_of_table(wanted, np.full(len(item_key), EVERYBODY, np.int64), item_key, score)
