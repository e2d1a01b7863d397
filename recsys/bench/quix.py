"""The peer: quixstreams keeping a user's counts by behaviour in the same time buckets, exactly once, on RocksDB."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from double11.v1.event_pb2 import Event

from feature_store.windows import DAY_US, HOUR_US
from recsys.core import EventType

_WIDTHS = {"10m": (HOUR_US // 6, 8), "h": (HOUR_US, 26), "d": (DAY_US, 32)}  # width of a bucket, how many are kept


def count(address: str, topic: str, num_events: int, folder: str) -> tuple[float, float]:
    """Wall and CPU seconds for the first events of a topic; the time to join the group is not counted."""
    from quixstreams import Application

    app = Application(
        broker_address=address,
        consumer_group=uuid4().hex,
        auto_offset_reset="earliest",
        state_dir=folder,
        loglevel="ERROR",
        processing_guarantee="exactly-once",
    )
    first_s = first_cpu_s = 0.0

    def counted(value: bytes, state: Any) -> None:
        nonlocal first_s, first_cpu_s
        if not first_s:
            first_s, first_cpu_s = time.perf_counter(), time.process_time()
        event = Event.FromString(value)
        kind, at = str(event.action.type), event.event_time_us
        kept = state.get("counts", {})
        for name, (width, number) in _WIDTHS.items():
            buckets = kept.setdefault(name, {})
            bucket = buckets.setdefault(str(at // width), {})
            bucket[kind] = bucket.get(kind, 0) + 1
            if len(buckets) > number:
                del buckets[min(buckets, key=int)]
        hours = kept.setdefault("hours", {})
        hour = str(at // HOUR_US % 24)
        hours[hour] = hours.get(hour, 0) + int(int(event.action.type) != EventType.IMPRESSION)
        state.set("counts", kept)

    frame = app.dataframe(app.topic(topic, value_deserializer="bytes", key_deserializer="str"))
    frame.update(counted, stateful=True)
    app.run(count=num_events, timeout=30)
    return time.perf_counter() - first_s, time.process_time() - first_cpu_s
