"""The trending lists of a run, going on: those of categories in which something happened, and always the shop's."""

from __future__ import annotations

import numpy as np

from recsys.candidates import trending
from recsys.candidates.ranked_list import read_half_life_us
from recsys.core import RunDirectory
from recsys.core.attributes import name_keys
from recsys.core.index_rows import IndexRows
from recsys.core.items import ItemTable
from recsys.training.online.index import Keys, joined, rows_of_table
from recsys.training.online.rates import OnlineRates


class OnlineTrending(OnlineRates):
    """Rows are lists by category. The list of the whole shop is made in every step in which anything happened."""

    NAME, FILE = trending.NAME, f"index/{trending.RATES}.parquet"

    def __init__(self, run: RunDirectory, rows_max: int, users_max: int) -> None:
        """As OnlineRates."""
        short_us = read_half_life_us(run.path(self.FILE))
        half_life_us = {"now": short_us, "usual": short_us * trending.LONG_TERM}
        super().__init__(run, rows_max, users_max, trending.RATES_SCHEMA, half_life_us)
        self._items = ItemTable.read(run.path("items.parquet"))
        self._category_key = np.append(name_keys(self._items.column("category")), trending.EVERYWHERE)

    def _rows_of(self, item_key: Keys) -> Keys:
        category = np.unique(self._category_key[self._items.rows(item_key)])
        named: Keys = category[category != trending.EVERYWHERE]
        return named

    def _made(self, wanted: Keys) -> IndexRows:
        if not len(wanted) and not len(self._step["rates.item_key"]):
            return joined([])
        key = np.unique(np.append(wanted, trending.EVERYWHERE))
        table = trending.lists(self.now(), self._items)
        owner, item_key, score = (table.column(name).to_numpy() for name in trending.SCHEMA.names)
        some = np.isin(owner, key)
        return rows_of_table(key, owner[some], item_key[some], score[some])
