"""EventBatch takes any subset of the columns, and says which column is wrong when one is."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from recsys.core import EVENT_SCHEMA, BadInput, EventBatch, EventKind, EventType

MINIMAL = {"event_id": ["a", "b"], "kind": [1, 1], "event_time": [10, 20]}


def test_defaults_are_filled_in() -> None:
    batch = EventBatch.from_columns({**MINIMAL, "user_id": ["u", None]})
    assert batch.table.schema == EVENT_SCHEMA
    assert batch.numpy("known_at").tolist() == [10, 20]
    assert batch.numpy("event_type").tolist() == [0, 0]
    assert batch.strings("user_id") == ["u", None]
    assert batch.table.column("late").to_pylist() == [False, False]
    assert batch.table.column("price").null_count == 2


def test_timestamps_of_any_unit_become_microseconds() -> None:
    at = datetime(2017, 11, 11, tzinfo=UTC)
    for unit in ("s", "ms", "us", "ns"):
        batch = EventBatch.from_columns(
            {"event_id": ["a"], "kind": [1], "event_time": pa.array([at], pa.timestamp(unit, tz="UTC"))}
        )
        assert batch.numpy("event_time").tolist() == [int(at.timestamp() * 1_000_000)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({**MINIMAL, "colour": ["red", "red"]}, "colour"),
        ({k: v for k, v in MINIMAL.items() if k != "event_id"}, "event_id.*no such column"),
        ({**MINIMAL, "event_id": ["a", None]}, "event_id.*1 nulls in 2 rows"),
        ({**MINIMAL, "event_time": ["soon", "later"]}, "event_time.*int64"),
        ({**MINIMAL, "kind": [1, 300]}, "kind.*int8"),
        ({**MINIMAL, "event_time": [1, None]}, "event_time.*nulls"),
        ({**MINIMAL, "price": [[1], [2]]}, "price"),
    ],
    ids=["unknown column", "missing column", "null id", "text as time", "out of range", "null time", "list"],
)
def test_wrong_columns_are_named(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        EventBatch.from_columns(columns)


def test_empty_and_concat() -> None:
    assert len(EventBatch.empty()) == 0
    assert len(EventBatch.concat([])) == 0
    batch = EventBatch.from_columns(MINIMAL)
    assert EventBatch.concat([batch, EventBatch.empty(), batch]).strings("event_id") == ["a", "b", "a", "b"]


def test_rows_by_kind_mask_index_and_chunk() -> None:
    batch = EventBatch.from_columns({"event_id": list("abcd"), "kind": [1, 2, 5, 1], "event_time": [1, 2, 3, 4]})
    assert batch.of_kind(EventKind.ACTION).strings("event_id") == ["a", "d"]
    assert batch.filter(np.array([False, True, True, False])).strings("event_id") == ["b", "c"]
    assert batch.take(np.array([3, 0])).strings("event_id") == ["d", "a"]
    assert [len(c) for c in batch.chunks(3)] == [3, 1]
    assert list(EventBatch.empty().chunks(3)) == []


def test_labels_are_those_of_the_dataset_directory() -> None:
    assert [t.label for t in EventType][1:] == ["impression", "view", "favorite", "cart", "purchase", "return"]


def test_numbers_are_those_of_the_protos() -> None:
    from double11.v1 import event_pb2, recommend_pb2

    from feature_store import FeatureStatus
    from recsys.core import Tier

    for ours, proto, prefix in (
        (EventType, event_pb2.ActionType, "ACTION_TYPE_"),
        (Tier, recommend_pb2.Tier, "TIER_"),
    ):
        theirs = {name.removeprefix(prefix): number for name, number in proto.items()}
        theirs.pop("UNSPECIFIED")
        assert {m.name: m.value for m in ours if m.value} == theirs
    from double11.v1 import feature_pb2

    names = {
        n.rsplit("STATUS_", 1)[1]: v for n, v in feature_pb2.FeatureStatus.items() if not n.endswith("UNSPECIFIED")
    }
    assert {m.name: m.value for m in FeatureStatus} == names
