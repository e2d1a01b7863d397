"""Daily values on disk, and labels joined to them without seeing their own day's end."""

import polars as pl
import pytest

from feature_store.offline import read, snapshot, write
from feature_store.online import MemoryStore
from feature_store.point_in_time import join
from recsys.core import EventBatch, NotFound

DAY = 86_400_000_000
START = 19_000 * DAY


def test_labels_get_the_values_of_the_day_before(tmp_path):
    store = MemoryStore()
    for day in range(3):
        store.apply(
            EventBatch.from_columns(
                {
                    "event_id": [f"{day}-{i}" for i in range(day + 1)],
                    "kind": [1] * (day + 1),
                    "event_type": [5] * (day + 1),
                    "event_time": [START + day * DAY + 1] * (day + 1),
                    "user_id": ["u"] * (day + 1),
                    "item_id": ["i"] * (day + 1),
                }
            )
        )
        frame = snapshot(store.load, "item", ["i", "unknown"], START + (day + 1) * DAY)
        assert frame["item_id"].to_list() == ["i"]
        write(frame, tmp_path, "item")
        write(frame, tmp_path, "item")  # again, to the same file
    values = read(tmp_path, "item").collect()
    assert values["purchase_count_all"].to_list() == [1, 3, 6]
    assert values["stock"].to_list() == [None] * 3
    labels = pl.DataFrame({"item_id": ["i"] * 3, "event_time": [START + DAY, START + DAY + 1, START + 9 * DAY]})
    assert join(labels, values, by="item_id")["purchase_count_all"].to_list() == [None, 1, 6]


def test_an_empty_offline_store_says_so(tmp_path):
    with pytest.raises(NotFound, match="no snapshot"):
        read(tmp_path, "user")
    assert snapshot(MemoryStore().load, "user", [], START).height == 0
