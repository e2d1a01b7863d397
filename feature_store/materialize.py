"""materialize: rebuild a store from a dataset or an archive, into a new namespace, then one atomic switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from feature_store.commit import Commit, OffsetStep, Rebuild, Rebuildable
from feature_store.state import Words
from feature_store.update import archived_updates, tombstone_updates
from recsys.core import EventBatch

HORIZON_US = 86_400 * 1_000_000


@dataclass(frozen=True, slots=True)
class Archived:
    """N events, each once. slate [N]: number of the slate that an event is part of, -1 for others."""

    batch: EventBatch
    slate: Words | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Covered:
    """What streaming goes on from after a rebuild: the log's id and, of it, next offsets; who has been forgotten, up
    to which time [len(users)].
    """

    log_id: str = ""
    offsets: Sequence[OffsetStep] = ()
    users: Sequence[str] = ()
    until_us: Sequence[int] = ()


def materialize(
    events: Iterable[EventBatch | Archived],
    store: Rebuildable,
    covered: Covered | None = None,
    *,
    horizon_us: int = HORIZON_US,
    on_batch: Callable[[int], object] | None = None,
) -> int:
    """Fold events with the code that folds online; readers see the result whole, at the end. Returns events read.

    What the store held before is dropped, its offsets included. Events marked late or stress are left out. The ids of
    the others are kept as the job keeps them, so that what of them is still in the log, beyond the covered offsets, is
    recognised: as a duplicate within the horizon, as late behind it; neither has an effect. So a record that left no
    row (a duplicate, a dead letter, a late event) does no harm either when it is read again: it is put aside, or
    classified, as it was.
    """
    covered, rebuild = covered or Covered(), store.rebuild()
    try:
        total = 0
        for some in events:
            some = some if isinstance(some, Archived) else Archived(some)
            if len(some.batch):
                _fold(some, rebuild, horizon_us)
                total += len(some.batch)
                if on_batch is not None:
                    on_batch(len(some.batch))
        stones = tombstone_updates(rebuild.load, covered.users, np.array(covered.until_us, np.int64))
        rebuild.commit(Commit(updates=(), seen_event_ids=stones, offsets=covered.offsets))
        rebuild.switch(covered.log_id)
    finally:
        rebuild.close()
    return total


def _fold(some: Archived, rebuild: Rebuild, horizon_us: int) -> None:
    updates, seen = archived_updates(rebuild.load, some.batch, slate=some.slate, horizon_us=horizon_us)
    time_us = some.batch.numpy("event_time")[~(some.batch.numpy("late") | some.batch.numpy("stress"))]
    newest_us = int(time_us.max(initial=0))
    rebuild.commit(Commit(updates=updates, seen_event_ids=seen, max_event_time_us=newest_us))
