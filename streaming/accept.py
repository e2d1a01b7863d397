"""Which events of a micro-batch are applied, and what is kept of them by user: ids seen, slates shown, tombstones.

Shape legend: N events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_store.columns import EventColumns
from feature_store.commit import DELIVERY, EntryKind, Update
from feature_store.forget import clear, screen
from feature_store.state import State, Words, decode, encode
from feature_store.update import Load
from recsys.core import EventKind
from streaming.dedup import Outcome, classify


@dataclass(frozen=True, slots=True)
class Accepted:
    """outcome [N]; applied [N]: events to fold; cleared: users to be deleted first; delivery: updates to write."""

    outcome: npt.NDArray[np.int8]
    applied: npt.NDArray[np.bool_]
    cleared: npt.NDArray[np.bool_]
    delivery: list[Update]


def accept(load: Load, events: EventColumns, slate: Words, horizon_us: int, *, shadow: bool = False) -> Accepted:
    """Classify N events in arrival order. slate [N]: number of the slate of each event, -1 for others."""
    ids = events.user_ids
    seen = decode(DELIVERY, load("seen", ids, shadow=shadow))
    screened = screen(events, seen["forgotten"])
    seen = State({**clear(seen, screened.cleared).rows, "forgotten": screened.forgotten})
    outcome = np.zeros(len(events), np.int8)
    outcome[~screened.keep & (events.kind != EventKind.FORGET)] = Outcome.FORGOTTEN
    acted = np.flatnonzero(screened.keep & (events.user_code >= 0) & (slate < 0))
    user, time_us, event_key = events.user_code[acted], events.time_us[acted], events.event_key[acted]
    outcome[acted], seen_ids = classify(user, time_us, event_key, seen["seen"], horizon_us)
    delivery = [_delivered("seen", ids, State({**seen.rows, "seen": seen_ids}), shadow)]
    shown = np.flatnonzero(screened.keep & (slate >= 0))
    if len(shown) or screened.cleared.any():
        # A slate is one unit: its events live or fall together, under the key of its first event.
        _, first, unit = np.unique(slate[shown], return_index=True, return_inverse=True)
        of_slate = shown[first]
        known = clear(decode(DELIVERY, load("shown", ids, shadow=shadow)), screened.cleared)
        user, time_us, event_key = (c[of_slate] for c in (events.user_code, events.time_us, events.event_key))
        found, kept = classify(user, time_us, event_key, known["seen"], horizon_us)
        outcome[shown] = found[unit]
        delivery.append(_delivered("shown", ids, State({**known.rows, "seen": kept}), shadow))
    return Accepted(outcome, (outcome == Outcome.APPLIED) & screened.keep, screened.cleared, delivery)


def _delivered(kind: EntryKind, ids: Sequence[str], state: State, shadow: bool) -> Update:
    return Update(kind, ids, encode(state), shadow)
