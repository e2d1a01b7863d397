"""taobao: the original UserBehavior.csv, no header: user, item, category, behaviour (pv|buy|cart|fav), seconds.

The log covers 2017-11-25 to 2017-12-03 in Beijing; rows outside (the original has some, even before 1970) are set
aside. All rows are held in memory, about 120 bytes each.
Source: https://tianchi.aliyun.com/dataset/649 (Zhu et al., KDD 2018).
"""

from __future__ import annotations

from datetime import UTC, datetime

import polars as pl

from recsys.data.importers import base
from recsys.data.importers.multi_behaviour import behaviour

COLUMNS = ("user_id", "item_id", "category_id", "behavior", "timestamp")
_FROM, _TO = datetime(2017, 11, 24, 16, tzinfo=UTC), datetime(2017, 12, 3, 16, tzinfo=UTC)


def _read(source: base.Source) -> base.Imported:
    path = source.find("UserBehavior.csv", "UserBehavior.csv.gz")
    rows = base.read_csv(path, source.scratch, required=COLUMNS, header=False)
    base.require(rows, path, COLUMNS)
    rows = base.parse(rows, path, {"behavior": behaviour("behavior"), "timestamp": base.epoch("timestamp", "s")})
    outside = ~pl.col("timestamp").is_between(_FROM, _TO, closed="left")
    rows, rejected = base.split(rows, path, {"outside_the_log": outside, "bad_id": base.bad_ids()})
    rows = rows.select(
        base.event_ids(base.fingerprint(path)),
        "user_id",
        "item_id",
        event_type=pl.col("behavior"),
        event_time=pl.col("timestamp"),
        category=pl.col("category_id"),
    ).sort("event_time", maintain_order=True)
    items = base.items_from_events(rows, first=("category",))
    return base.Imported(events=rows.drop("category"), items=items, rejected=rejected)


IMPORTER = base.Importer(format="taobao", licence="CC BY-NC-SA 4.0 (Tianchi)", read=_read)
