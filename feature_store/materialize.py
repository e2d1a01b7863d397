"""materialize: rebuild a store from a dataset or an archive, into a new generation, then one atomic switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from feature_store.commit import Commit, DurableStore
from feature_store.update import archived_updates
from recsys.core import EventBatch


def materialize(
    batches: Iterable[EventBatch], store: DurableStore, *, on_batch: Callable[[int], object] | None = None
) -> int:
    """Fold batches with the code that folds online; readers see the result whole, at the end. Returns events read.

    What the store held before is dropped, its offsets included. Events marked late or stress are left out.
    """
    rebuild, total = store.rebuild(), 0
    for batch in batches:
        if not len(batch):
            continue
        updates, tombstones = archived_updates(rebuild.load, batch)
        newest_us = int(batch.numpy("event_time").max())
        rebuild.commit(Commit(updates=updates, seen_event_ids=tombstones, max_event_time_us=newest_us))
        total += len(batch)
        if on_batch is not None:
            on_batch(len(batch))
    rebuild.switch()
    return total
