"""Values from state: what every reader returns, whatever store the state came from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from feature_store.base import FeatureStatus, ItemFeatures, UserFeatures
from feature_store.compiled import lists
from feature_store.state import Rows, State, decode, encode
from feature_store.views import ITEM, ITEM_FEATURE_NAMES, USER, USER_FEATURE_NAMES
from feature_store.views.user_item import pairs_of


def warm_up() -> None:
    """Load the compiled functions that a read needs, or compile them: milliseconds, or seconds once on a machine."""
    state = State.empty(USER.tables, 1)
    one = np.zeros((len(USER.tables[0].columns), 1), np.int64).T
    known = Rows(USER.tables[0], np.array((0, 1)), one)  # of `life`, by which an entity is known
    (blob,) = encode(State({**state.rows, known.table.name: known}))
    user_features("", blob, 1)
    item_features([b""], 1)


def user_features(user_id: str, blob: bytes | memoryview, as_of_us: int) -> UserFeatures:
    """Everything about one user from the packed state; b"" = NOT_FOUND.

    Raises: CorruptData.
    """
    state = decode(USER.tables, [blob])
    if not len(state["life"].words):
        return UserFeatures.not_found(user_id, as_of_us, USER_FEATURE_NAMES)
    number = USER.read(state, as_of_us).number[0]
    recent = state["recent"].columns
    newest, kinds = np.empty((2, recent.shape[1]), np.int64), np.empty(recent.shape[1], np.int8)
    n = lists.by_time(recent, as_of_us, kinds, newest)
    pairs = pairs_of(state["pairs"], as_of_us)
    return UserFeatures(
        user_id=user_id,
        as_of_us=as_of_us,
        status=FeatureStatus.PRESENT,
        recent_item_key=newest[0, :n],
        recent_event_type=kinds[:n],
        recent_time_us=newest[1, :n],
        pair_item_key=pairs.item_key,
        pair_count=pairs.count,
        pair_first_us=pairs.first_us,
        pair_last_us=pairs.last_us,
        pair_last_purchase_us=pairs.last_purchase_us,
        pair_purchase_days=pairs.purchase_days,
        pair_quantity_level=pairs.quantity_level,
        pair_last_quantity_level=pairs.last_quantity_level,
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
