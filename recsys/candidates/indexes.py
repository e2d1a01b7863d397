"""Every light index of a run: what training writes to index/NAME.parquet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import polars as pl
import pyarrow as pa

from recsys.candidates import (
    buy_again,
    covisit,
    new_arrivals,
    popular,
    regression,
    swing,
    text_similar,
    trending,
    user_knn,
)
from recsys.candidates.covisit import CovisitConfig
from recsys.core.items import ItemTable

_Builder = Callable[[pl.DataFrame, ItemTable, int], pa.Table]


def build_all(
    events: pl.DataFrame, items: ItemTable, until_us: int, *, covisit_config: CovisitConfig = covisit.DEFAULT
) -> dict[str, pa.Table]:
    """Tables by name, from events strictly before `until_us` and the items known then.

    covisit_config: what training also writes into the manifest's config, under the section's name.
    """
    builders: dict[str, _Builder] = {
        covisit.NAME: partial(covisit.build, config=covisit_config),
        swing.NAME: partial(swing.build, config=covisit_config),
        regression.NAME: regression.build,
        text_similar.NAME: text_similar.build,
        user_knn.NAME: user_knn.build,
        buy_again.NAME: buy_again.build,
        popular.NAME: popular.build,
        trending.NAME: trending.build,
        new_arrivals.NAME: new_arrivals.build,
    }
    return {name: build(events, items, until_us) for name, build in builders.items()}


def build_online(
    events: pl.DataFrame, items: ItemTable, until_us: int, *, covisit_config: CovisitConfig = covisit.DEFAULT
) -> dict[str, pa.Table]:
    """What online training goes on from, to make rows of some of these again; arguments as of `build_all`."""
    builders: dict[str, _Builder] = {
        swing.USERS: partial(swing.build_users, config=covisit_config),
        popular.RATES: popular.build_rates,
        trending.RATES: trending.build_rates,
    }
    return {name: build(events, items, until_us) for name, build in builders.items()}
