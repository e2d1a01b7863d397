"""The peer: quixstreams counting by behaviour in the same time buckets, exactly once, on RocksDB.

Users, then items behind its own repartition topic (`group_by`), as our two stages with `item-updates` between them.
What else our views keep (last-N, pairs, affinities, prices, stock), and the ids of events seen, it does not keep.
"""

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
    users = items = 0

    def of_user(value: bytes, state: Any) -> None:
        nonlocal first_s, first_cpu_s, users
        if not first_s:
            first_s, first_cpu_s = time.perf_counter(), time.process_time()
        users += 1
        event = Event.FromString(value)
        kept = _counted(event, state)
        hours = kept.setdefault("hours", {})
        hour = str(event.event_time_us // HOUR_US % 24)
        hours[hour] = hours.get(hour, 0) + int(int(event.action.type) != EventType.IMPRESSION)
        state.set("counts", kept)

    def of_item(value: bytes, state: Any) -> None:
        nonlocal items
        items += 1
        state.set("counts", _counted(Event.FromString(value), state))
        if items >= num_events:
            app.stop()

    frame = app.dataframe(app.topic(topic, value_deserializer="bytes", key_deserializer="str"))
    frame = frame.filter(lambda _: users < num_events).update(of_user, stateful=True)
    frame = frame.group_by(
        lambda value: Event.FromString(value).action.item_id,
        name="item",
        value_serializer="bytes",
        value_deserializer="bytes",
        key_serializer="str",
        key_deserializer="str",
    )
    frame.update(of_item, stateful=True)
    app.run(timeout=30)
    return time.perf_counter() - first_s, time.process_time() - first_cpu_s


def _counted(event: Event, state: Any) -> dict[str, Any]:
    """The entity's counts with one event more."""
    kind, at = str(event.action.type), event.event_time_us
    kept: dict[str, Any] = state.get("counts", {})
    for name, (width, number) in _WIDTHS.items():
        buckets = kept.setdefault(name, {})
        bucket = buckets.setdefault(str(at // width), {})
        bucket[kind] = bucket.get(kind, 0) + 1
        if len(buckets) > number:
            del buckets[min(buckets, key=int)]
    return kept
