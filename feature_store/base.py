"""What serving, training and replay read from any store.

Shape legend: L recent events, P pairs, N items, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from recsys.core import Deadline


class FeatureStatus(IntEnum):
    """Why a value is what it is; the numbers are those of feature.proto."""

    PRESENT = 1
    NULL = 2
    NOT_FOUND = 3
    OUTSIDE_MAX_AGE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class UserFeatures:
    """Everything about one user at a time, from events strictly before it.

    status: NOT_FOUND for a user without events; then every array is empty and every value NaN.
    recent_*: the last L actions (impressions left out), oldest first: item key, EventType, microseconds UTC.
    pair_*: one row per item the user has acted on, newest kept when the bound is reached: item key, count per
    EventType (int32 [P, 7], column = EventType number), first and last action, number of distinct days with a purchase,
    mean natural logarithm of the quantities bought, ever and on the last day with a purchase (0 = single pieces, or
    none).
    values: scalar user features by name (NaN = NULL or OUTSIDE_MAX_AGE).
    """

    user_id: str
    as_of_us: int
    status: FeatureStatus
    recent_item_key: npt.NDArray[np.int64]
    recent_event_type: npt.NDArray[np.int8]
    recent_time_us: npt.NDArray[np.int64]
    pair_item_key: npt.NDArray[np.int64]
    pair_count: npt.NDArray[np.int32]
    pair_first_us: npt.NDArray[np.int64]
    pair_last_us: npt.NDArray[np.int64]
    pair_last_purchase_us: npt.NDArray[np.int64]
    pair_purchase_days: npt.NDArray[np.int32]
    pair_quantity_level: npt.NDArray[np.float32]
    pair_last_quantity_level: npt.NDArray[np.float32]
    values: Mapping[str, float]

    @classmethod
    def not_found(cls, user_id: str, as_of_us: int, names: Sequence[str] = ()) -> UserFeatures:
        """A user without events."""
        i64, i32, f32 = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
        return cls(
            user_id=user_id,
            as_of_us=as_of_us,
            status=FeatureStatus.NOT_FOUND,
            recent_item_key=i64,
            recent_event_type=np.empty(0, np.int8),
            recent_time_us=i64,
            pair_item_key=i64,
            pair_count=np.empty((0, 7), np.int32),
            pair_first_us=i64,
            pair_last_us=i64,
            pair_last_purchase_us=i64,
            pair_purchase_days=i32,
            pair_quantity_level=f32,
            pair_last_quantity_level=f32,
            values=dict.fromkeys(names, float("nan")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemFeatures:
    """Scalar features of N items at a time. values: float32 [N, F], NaN unless status is PRESENT; status: int8 [N, F].

    Names include price, stock, listed (1/0), age_days and counts by behaviour and window; all are in
    `feature_store.views`.
    """

    names: tuple[str, ...]
    values: npt.NDArray[np.float32]
    status: npt.NDArray[np.int8]

    def column(self, name: str) -> npt.NDArray[np.float32]:
        """One feature [N]. Raises KeyError for a name it does not have."""
        if name not in self.names:
            raise KeyError(name)
        return self.values[:, self.names.index(name)]


class FeatureReader(Protocol):
    """Reads features as of a time. Implementations: memory (training, replay), embedded, Redis."""

    @property
    def view_set(self) -> str:
        """Version of the view set that is read."""
        ...

    def max_event_time_us(self) -> int:
        """The largest event time applied, microseconds UTC; 0 for an empty store. What `clock = data` reads."""
        ...

    async def user(self, user_id: str, as_of_us: int, deadline: Deadline) -> UserFeatures:
        """All features of one user, user x item included.

        Raises: Unavailable, DeadlineExceeded. An unknown user is NOT_FOUND, not an error.
        """
        ...

    async def items(self, item_ids: Sequence[str], as_of_us: int, deadline: Deadline) -> ItemFeatures:
        """Features of N items in the order asked; unknown items have status NOT_FOUND in every column.

        Raises: Unavailable, DeadlineExceeded.
        """
        ...
