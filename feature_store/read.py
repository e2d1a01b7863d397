"""Values from state: what every reader returns, whatever store the state came from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from feature_store.base import FeatureStatus, ItemFeatures, UserFeatures
from feature_store.state import State, decode
from feature_store.views import ITEM, ITEM_FEATURE_NAMES, USER, USER_FEATURE_NAMES
from feature_store.views.user_item import pairs_of


def user_features(user_id: str, blob: bytes | memoryview, as_of_us: int) -> UserFeatures:
    """Everything about one user from the packed state; b"" = NOT_FOUND.

    Raises: CorruptData.
    """
    state = decode(USER.tables, [blob])
    if not len(state["life"].words):
        return UserFeatures.not_found(user_id, as_of_us, USER_FEATURE_NAMES)
    number = USER.read(state, as_of_us).number[0]
    recent = state["recent"]
    if int(recent["time_us"].max(initial=0)) >= as_of_us:
        recent = recent.where(recent["time_us"] < as_of_us)
    order = np.argsort(recent["time_us"], kind="stable")
    time_us = recent["time_us"][order]
    if (time_us[1:] == time_us[:-1]).any():
        order = np.lexsort((recent["event_key"], recent["time_us"]))
    pairs = pairs_of(state["pairs"], as_of_us)
    return UserFeatures(
        user_id=user_id,
        as_of_us=as_of_us,
        status=FeatureStatus.PRESENT,
        recent_item_key=recent["item_key"][order],
        recent_event_type=recent["event_type"][order].astype(np.int8),
        recent_time_us=time_us,
        pair_item_key=pairs.item_key,
        pair_count=pairs.count,
        pair_first_us=pairs.first_us,
        pair_last_us=pairs.last_us,
        pair_last_purchase_us=pairs.last_purchase_us,
        pair_purchase_days=pairs.purchase_days,
        values=dict(zip(USER_FEATURE_NAMES, number.tolist(), strict=True)),
    )


def item_features(blobs: Sequence[bytes | memoryview], as_of_us: int) -> ItemFeatures:
    """Features of N items from their packed states; b"" = NOT_FOUND.

    Raises: CorruptData.
    """
    values = ITEM.read(item_state(blobs), as_of_us)
    return ItemFeatures(names=ITEM_FEATURE_NAMES, values=values.number.astype(np.float32), status=values.status)


def item_state(blobs: Sequence[bytes | memoryview]) -> State:
    """State of N items."""
    return decode(ITEM.tables, blobs)
