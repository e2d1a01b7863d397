"""What every OnlineStore does, whatever it is kept in."""

import numpy as np
import pytest

from feature_store import FeatureStatus
from feature_store.commit import has_buckets
from feature_store.online import Commit, OffsetStep, OnlineStore, Update
from feature_store.update import archived_updates
from feature_store.views import ITEM_FEATURE_NAMES, VIEW_SET
from recsys.core import Conflict, Deadline, DeadlineExceeded, EventBatch, EventKind, key
from recsys.core.murmur2 import partition_of

NEVER = Deadline.never()
T = 1_600_000_000_000_000


def actions(n: int, start: int = 0) -> EventBatch:
    return EventBatch.from_columns(
        {
            "event_id": [f"e{i}" for i in range(start, start + n)],
            "kind": [1] * n,
            "event_type": [5] * n,
            "event_time": [T + i for i in range(start, start + n)],
            "user_id": ["ann"] * n,
            "item_id": [f"i{i % 3}" for i in range(n)],
            "price": [100] * n,
        }
    )


def commit(store: OnlineStore, batch: EventBatch, *offsets: OffsetStep) -> None:
    updates, seen = archived_updates(store.load, batch)
    newest = int(batch.numpy("event_time").max())
    store.commit(Commit(updates=updates, seen_event_ids=seen, offsets=offsets, max_event_time_us=newest))


async def test_an_empty_store_knows_nobody_and_reads_from_zero(store):
    user = await store.user("ann", T, NEVER)
    items = await store.items(["x", ""], T, NEVER)
    assert user.status is FeatureStatus.NOT_FOUND
    assert (items.status == FeatureStatus.NOT_FOUND).all()
    assert store.max_event_time_us() == 0
    assert store.offsets("events") == {}
    assert store.view_set == VIEW_SET
    assert store.store_id


async def test_a_commit_moves_state_and_offsets_together(store):
    commit(store, actions(3), OffsetStep("events", 2, 0, 3))
    commit(store, actions(4, start=3), OffsetStep("events", 2, 3, 7), OffsetStep("catalog", 0, 0, 1))
    user = await store.user("ann", T + 100, NEVER)
    assert user.values["purchase_count_all"] == 7
    assert user.recent_time_us.tolist() == [T + i for i in range(7)]
    assert store.offsets("events") == {2: 7}
    assert store.offsets("catalog") == {0: 1}
    assert store.max_event_time_us() == T + 6


async def test_a_step_from_another_offset_is_refused_whole(store):
    mine, other = (bucket := partition_of(b"ann", 8)), (bucket + 1) % 8
    commit(store, actions(3), OffsetStep("events", mine, 0, 3))
    with pytest.raises(Conflict, match=rf"events, partition {mine}.*from 3"):
        commit(store, actions(3, start=3), OffsetStep("events", other, 0, 9), OffsetStep("events", mine, 0, 6))
    # Where state moves bucket by bucket, so does the refusal.
    assert store.offsets("events") == {mine: 3} | ({other: 9} if has_buckets(store) else {})
    assert (await store.user("ann", T + 100, NEVER)).values["purchase_count_all"] == 3


async def test_items_come_in_the_order_asked_with_repeats(store):
    commit(store, actions(7))
    found = await store.items(["i2", "nope", "i0", "i2"], T + 100, NEVER)
    assert found.names == ITEM_FEATURE_NAMES
    assert found.values.dtype == np.float32
    assert found.values.shape == (4, len(ITEM_FEATURE_NAMES))
    count = found.column("purchase_count_all")
    assert count[[0, 2, 3]].tolist() == [2, 3, 2]
    assert np.isnan(count[1])
    assert found.status[1, 0] == FeatureStatus.NOT_FOUND


async def test_no_items_is_an_answer(store):
    assert (await store.items([], T, NEVER)).values.shape == (0, len(ITEM_FEATURE_NAMES))


async def test_an_expired_deadline_is_refused(store):
    with pytest.raises(DeadlineExceeded):
        await store.user("ann", T, Deadline.after_ms(-1))
    with pytest.raises(DeadlineExceeded):
        await store.items(["i0"], T, Deadline.after_ms(-1))


async def test_ids_of_any_length_and_script(store):
    batch = actions(1).table.to_pydict() | {"user_id": ["买" * 85], "item_id": ["é" * 128]}
    commit(store, EventBatch.from_columns(batch))
    assert (await store.user("买" * 85, T + 9, NEVER)).recent_item_key.tolist() == [key("é" * 128)]
    assert (await store.user("x" * 10_000, T, NEVER)).status is FeatureStatus.NOT_FOUND


async def test_a_shadow_namespace_is_apart(store):
    updates, _ = archived_updates(store.load, actions(3))
    store.commit(Commit(updates=[Update(u.kind, u.ids, u.blobs, shadow=True) for u in updates]))
    assert (await store.user("ann", T + 9, NEVER)).status is FeatureStatus.NOT_FOUND
    assert store.load("user", ["ann"], shadow=True) != [b""]


async def test_forgetting_removes_a_user_and_keeps_older_events_out(store):
    commit(store, actions(5))
    forget = {"event_id": ["f"], "kind": [int(EventKind.FORGET)], "event_time": [T + 10], "user_id": ["ann"]}
    commit(store, EventBatch.from_columns(forget))
    assert (await store.user("ann", T + 99, NEVER)).status is FeatureStatus.NOT_FOUND
    commit(store, actions(5, start=6))
    assert (await store.user("ann", T + 99, NEVER)).status is FeatureStatus.NOT_FOUND
    commit(store, actions(5, start=11))
    user = await store.user("ann", T + 99, NEVER)
    assert user.values["purchase_count_all"] == 5
    assert user.recent_time_us.min() == T + 11
    assert (await store.items(["i0"], T + 99, NEVER)).column("purchase_count_all")[0] > 0
