"""Redis and memory hold the same after the same steps, by writers that come and go."""

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from redis_world import redis_standalone

from feature_store.online import Commit, MemoryStore, OffsetStep, open_store
from feature_store.update import archived_updates
from recsys.core import EventBatch

__all__ = ["redis_standalone"]
IDS = [f"{i}" for i in range(30)]


def step(store, events: EventBatch, at: int) -> Commit:
    updates, seen = archived_updates(store.load, events)
    newest = int(events.numpy("event_time").max())
    offsets = [OffsetStep("events", 0, at, at + len(events))]
    return Commit(updates=updates, seen_event_ids=seen, offsets=offsets, max_event_time_us=newest)


@pytest.fixture(scope="module")
def url(redis_standalone) -> str:
    return str(redis_standalone)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=5))
def test_same_steps_same_state(url, seed, steps):
    redis.Redis.from_url(url).flushdb()
    rng, memory, store, at = np.random.default_rng(seed), MemoryStore(), open_store(url), 0
    for n, leaves in steps:
        events = EventBatch.from_columns(
            {
                "event_id": [f"e{at + i}" for i in range(n)],
                "kind": [1] * n,
                "event_type": rng.integers(1, 7, n),
                "event_time": 1_600_000_000_000_000 + rng.integers(0, 10**12, n),
                "user_id": rng.choice(IDS, n).tolist(),
                "item_id": rng.choice(IDS, n).tolist(),
                "price": rng.integers(1, 900, n).tolist(),
            }
        )
        memory.commit(step(memory, events, at))
        store.commit(step(store, events, at))
        at += n
        if leaves:
            store.close()
            store = open_store(url)
        assert store.offsets("events") == memory.offsets("events")
        assert store.max_event_time_us() == memory.max_event_time_us()
        for kind in ("user", "item", "seen"):
            assert store.load(kind, IDS) == memory.load(kind, IDS)
    store.close()
