"""What serving would read of an entity, feature by feature with status, event time and age: for `features get`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from feature_store.base import FeatureStatus
from feature_store.read import item_state, user_features
from feature_store.state import decode
from feature_store.view import Views
from feature_store.views import ITEM, USER
from recsys.core import EventType

_RECENT_MAX = 20


def describe(kind: str, entity_id: str, blob: bytes, as_of_us: int) -> dict[str, Any]:
    """{"kind", "id", "features": {NAME: {"status", "value", "event_time", "age_s"}}} of a user or an item.

    A user also has the newest actions as lists (`recent_item_key`, `recent_event_type`, `recent_time`).
    Raises: CorruptData.
    """
    views: Views = USER if kind == "user" else ITEM
    state = decode(USER.tables, [blob]) if kind == "user" else item_state([blob])
    values, times = views.read(state, as_of_us), views.times(state)
    features = {
        name: _feature(int(values.status[0, f]), float(values.number[0, f]), int(times[0, f]), as_of_us)
        for f, name in enumerate(views.feature_names)
    }
    if kind == "user":
        user = user_features(entity_id, blob, as_of_us)
        newest = int(user.recent_time_us[-1]) if len(user.recent_time_us) else 0
        lists = {
            "recent_item_key": user.recent_item_key[-_RECENT_MAX:].tolist(),
            "recent_event_type": [EventType(t).label for t in user.recent_event_type[-_RECENT_MAX:].tolist()],
            "recent_time": [iso(t) for t in user.recent_time_us[-_RECENT_MAX:].tolist()],
        }
        known = user.status is FeatureStatus.PRESENT
        status = FeatureStatus.NOT_FOUND if not known else FeatureStatus.PRESENT if newest else FeatureStatus.NULL
        features |= {name: _entry(status, value, newest, as_of_us) for name, value in lists.items()}
    return {"kind": kind, "id": entity_id, "features": features}


def iso(time_us: int) -> str:
    """ISO 8601 in UTC, microseconds."""
    return f"{np.datetime64(time_us, 'us')}Z"


def _feature(status: int, value: float, time_us: int, as_of_us: int) -> dict[str, Any]:
    return _entry(FeatureStatus(status), None if math.isnan(value) else value, time_us, as_of_us)


def _entry(status: FeatureStatus, value: Any, time_us: int, as_of_us: int) -> dict[str, Any]:
    known = status in (FeatureStatus.PRESENT, FeatureStatus.OUTSIDE_MAX_AGE) and time_us > 0
    return {
        "status": status.name,
        "value": value if status is FeatureStatus.PRESENT else None,
        "event_time": iso(time_us) if known else None,
        "age_s": (as_of_us - time_us) / 1e6 if known else None,
    }
