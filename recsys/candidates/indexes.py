"""Every light index of a run: what training writes to index/NAME.parquet."""

from __future__ import annotations

import polars as pl
import pyarrow as pa

from recsys.candidates import covisit, new_arrivals, popular, trending
from recsys.core.items import ItemTable

BUILDERS = {module.NAME: module.build for module in (covisit, popular, trending, new_arrivals)}


def build_all(events: pl.DataFrame, items: ItemTable, until_us: int) -> dict[str, pa.Table]:
    """Tables by name, from events strictly before `until_us` and the items known then."""
    return {name: build(events, items, until_us) for name, build in BUILDERS.items()}
