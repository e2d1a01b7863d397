"""Seeded events for benchmarks: users with a few favourite items, times over thirty days."""

from __future__ import annotations

import numpy as np

from recsys.core import EventBatch, EventKind, EventType

START_US = 1_700_000_000_000_000
SPAN_US = 30 * 86_400 * 1_000_000
_TYPES = np.array([EventType.VIEW, EventType.CART, EventType.PURCHASE], np.int8)


def events(num_events: int, num_users: int, num_items: int, seed: int = 0) -> EventBatch:
    """Actions in event-time order; items are drawn with a long tail."""
    rng = np.random.default_rng(seed)
    item = np.minimum((rng.pareto(1.2, num_events) * num_items / 50).astype(np.int64), num_items - 1)
    return EventBatch.from_columns(
        {
            "event_id": [f"e{i}" for i in range(num_events)],
            "kind": np.full(num_events, EventKind.ACTION, np.int8),
            "event_type": rng.choice(_TYPES, num_events, p=[0.8, 0.12, 0.08]),
            "event_time": START_US + np.sort(rng.integers(0, SPAN_US, num_events)),
            "user_id": [f"u{u}" for u in rng.integers(0, num_users, num_events)],
            "item_id": [f"i{i}" for i in item],
        }
    )
