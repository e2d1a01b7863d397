"""Records of the `samples` topic as training examples: what somebody acted on after it was shown.

A sample may come twice (at least once delivery) or again with more actions (late): each sample_id trains once, the
first time it has an action, as far back as `Seen` reaches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from double11.v1.sample_pb2 import Sample
from google.protobuf.message import DecodeError

from recsys.candidates.behaviour import WEIGHT
from recsys.core.ids import key
from recsys.core.metrics import TRAINING_SAMPLES
from recsys.training.tower_data import BEHAVIOUR_WEIGHT

_WEIGHT = {int(event_type): weight for event_type, weight in BEHAVIOUR_WEIGHT.items()}


@dataclass(frozen=True, slots=True)
class Positive:
    """An item somebody acted on: seen at time_us (features are strictly before it).

    weight: of the example. interest: what the action says about the item (`behaviour.WEIGHT`).
    """

    user_id: str
    item_key: int
    time_us: int
    weight: float
    interest: float


class Seen:
    """Keys of the samples trained last, at most `keys_max`; the oldest are forgotten first."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max, self._keys = keys_max, dict[int, None]()

    def add(self, sample_key: int) -> bool:
        """False when it was there."""
        if sample_key in self._keys:
            return False
        self._keys[sample_key] = None
        if len(self._keys) > self._keys_max:
            del self._keys[next(iter(self._keys))]
        return True

    def keys(self) -> npt.NDArray[np.int64]:
        """All of them, oldest first."""
        return np.fromiter(self._keys, np.int64, len(self._keys))


def positives(values: Iterable[bytes], seen: Seen) -> tuple[list[Positive], list[int], int]:
    """What to train on, the keys of these samples, and the newest impression time (microseconds UTC, 0 = none).

    Every record's outcome is counted: trained, no-action, repeat, stress, undecodable.
    """
    found: list[Positive] = []
    sample_keys: list[int] = []
    newest_us = 0
    for value in values:
        outcome = "undecodable"
        sample = _parse(value)
        if sample is not None:
            newest_us = max(newest_us, sample.event_time_us)
            weight = max((_WEIGHT.get(t, 0.0) for t in sample.action_types), default=0.0)
            sample_key = key(sample.sample_id)
            if sample.stress:
                outcome = "stress"
            elif not weight:
                outcome = "no-action"
            elif not seen.add(sample_key):
                outcome = "repeat"
            else:
                outcome = "trained"
                interest = max(float(WEIGHT[t]) for t in sample.action_types if t in _WEIGHT)
                found.append(Positive(sample.user_id, key(sample.item_id), sample.event_time_us, weight, interest))
                sample_keys.append(sample_key)
        TRAINING_SAMPLES.labels(outcome=outcome).inc()
    return found, sample_keys, newest_us


def _parse(value: bytes) -> Sample | None:
    try:
        sample = Sample.FromString(value)
    except DecodeError:
        return None
    return sample if sample.sample_id and sample.user_id and sample.item_id and sample.event_time_us > 0 else None
