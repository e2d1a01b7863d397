"""Histories as model inputs: what a user did, how, and how long ago. The one encoding for training and serving.

Shape legend: B users, V actions of all users together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.models.jagged import range_rows

NUM_EVENT_TYPES = 7  # recsys.core.EventType
NUM_AGE_BUCKETS = 32
_US_PER_S = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Histories:
    """B users' actions, oldest first. item_key, event_type, time_us: int64 [V]; lengths, as_of_us: int64 [B]."""

    item_key: npt.NDArray[np.int64]
    event_type: npt.NDArray[np.int64]
    time_us: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    as_of_us: npt.NDArray[np.int64]

    @classmethod
    def from_lists(
        cls,
        item_key: Sequence[npt.NDArray[np.int64]],
        event_type: Sequence[npt.NDArray[np.int8]],
        time_us: Sequence[npt.NDArray[np.int64]],
        as_of_us: Sequence[int],
    ) -> Histories:
        """From one array per user."""
        return cls(
            item_key=_flat(item_key),
            event_type=_flat(event_type),
            time_us=_flat(time_us),
            lengths=np.fromiter((len(x) for x in item_key), np.int64, len(item_key)),
            as_of_us=np.asarray(as_of_us, np.int64),
        )

    @classmethod
    def concat(cls, parts: Sequence[Histories]) -> Histories:
        """All users of all parts, in order."""
        return cls(
            item_key=_flat([p.item_key for p in parts]),
            event_type=_flat([p.event_type for p in parts]),
            time_us=_flat([p.time_us for p in parts]),
            lengths=_flat([p.lengths for p in parts]),
            as_of_us=_flat([p.as_of_us for p in parts]),
        )

    def take(self, users: npt.NDArray[np.int64]) -> Histories:
        """The given users in the given order."""
        rows = range_rows((np.cumsum(self.lengths) - self.lengths)[users], self.lengths[users])
        return Histories(
            item_key=self.item_key[rows],
            event_type=self.event_type[rows],
            time_us=self.time_us[rows],
            lengths=self.lengths[users],
            as_of_us=self.as_of_us[users],
        )

    def last(self, length_max: int) -> Histories:
        """Only each user's newest `length_max` actions."""
        lengths = np.minimum(self.lengths, length_max)
        rows = range_rows(np.cumsum(self.lengths) - lengths, lengths)
        return Histories(
            item_key=self.item_key[rows],
            event_type=self.event_type[rows],
            time_us=self.time_us[rows],
            lengths=lengths,
            as_of_us=self.as_of_us,
        )

    def age_bucket(self) -> npt.NDArray[np.int64]:
        """floor(log2(1 + seconds before as_of)) of each action, at most NUM_AGE_BUCKETS - 1; int64 [V]."""
        age_s = np.maximum(np.repeat(self.as_of_us, self.lengths) - self.time_us, 0) / _US_PER_S
        bucket: npt.NDArray[np.int64] = np.minimum(np.log2(1.0 + age_s), NUM_AGE_BUCKETS - 1).astype(np.int64)
        return bucket


def _flat(lists: Sequence[npt.NDArray[np.int64]] | Sequence[npt.NDArray[np.int8]]) -> npt.NDArray[np.int64]:
    return np.concatenate(lists).astype(np.int64) if lists else np.empty(0, np.int64)
