"""[heavy] LiveIndex: a base segment, a delta and tombstones; rebuilt behind the readers' backs.

upsert -> a row of the delta, visible when the call returns; the older row dies
delete -> the row dies, when the call returns no later search gives it
enough delta or dead rows -> a thread builds a new base from what is alive, then swaps it in under the writers' lock

Readers hold whatever state they began with and never wait. Writers are serialised by one lock, which a rebuild holds
only to take its copy and to swap. Memory: base + delta of fixed capacity; twice the base while a rebuild runs.
Shape legend: N items of a call, B queries, D dimension, K neighbours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recsys.candidates.nearest.base import Keys, Vectors
from recsys.candidates.nearest.engine import yield_cores
from recsys.candidates.nearest.rows import Rows, RowSet
from recsys.candidates.nearest.segments import BaseSegment, DeltaSegment
from recsys.candidates.nearest.sharded import merge
from recsys.candidates.nearest.static import AnnIndex, checked, other_dimension
from recsys.core import BadInput, Overloaded, metrics
from recsys.core.attributes import EVERYTHING, Attributes, Where
from recsys.core.logging import get_logger
from recsys.models.config import IndexConfig, LiveIndexConfig

_log = get_logger(__name__)
_RETRY_S = 30.0  # after a rebuild that failed
DEFAULT, DEFAULT_LIVE = IndexConfig(), LiveIndexConfig()


@dataclass(frozen=True, slots=True)
class State:
    """What a search looks at: replaced as a whole by a rebuild."""

    base: BaseSegment
    delta: DeltaSegment


class LiveIndex:
    """Implements VectorIndex over items that come, change and go."""

    def __init__(
        self,
        base: AnnIndex,
        attributes: Attributes | None = None,
        *,
        config: IndexConfig = DEFAULT,
        live: LiveIndexConfig = DEFAULT_LIVE,
    ) -> None:
        """attributes: of the base's items in the order of `base.row_key`; None = nothing is known."""
        known = Attributes.unknown(len(base)) if attributes is None else attributes
        self._config, self._live = config, live
        self._state = self._fresh(base, known)
        self._write = threading.RLock()
        self._touched: set[int] | None = None  # keys written to since a rebuild took its copy
        self._changed_since_training = 0
        self._one_rebuild = threading.Lock()
        self._rebuilding: threading.Thread | None = None
        self._rebuild_not_before_s = 0.0  # monotonic; moved on by a failure
        self.on_search: Callable[[Vectors, int, Where, Keys], None] | None = None  # for a recall monitor

    def _fresh(self, base: AnnIndex, attributes: Attributes) -> State:
        alive = RowSet.where(np.ones(len(base), np.bool_))
        segment = BaseSegment(base, attributes, alive, self._live.filters_max)
        return State(segment, DeltaSegment(base.dim, self._live.delta_items_max))

    @property
    def dim(self) -> int:
        """Dimension D."""
        return self._state.base.index.dim

    def __len__(self) -> int:
        return self._state.base.num_alive + len(self._state.delta)

    @property
    def room_items_max(self) -> int:
        """Items that the delta takes between two rebuilds."""
        return self._live.delta_items_max

    def search(self, vectors: Vectors, k: int, where: Where = EVERYTHING) -> tuple[Keys, Vectors]:
        """See VectorIndex."""
        queries = checked(vectors, self.dim)
        item_key, scores = _search(self._state, queries, k, where, exact=False)
        if self.on_search is not None:
            self.on_search(queries, k, where, item_key)
        return item_key, scores

    def exact(self, vectors: Vectors, k: int, where: Where = EVERYTHING) -> tuple[Keys, Vectors]:
        """The same by the exact scan over everything: what the recall monitor compares with."""
        return _search(self._state, checked(vectors, self.dim), k, where, exact=True)

    def has(self, item_key: Keys) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """True [N] for items that are there."""
        with self._write:
            state = self._state
            found: np.ndarray[tuple[int], np.dtype[np.bool_]] = (state.base.find(item_key) >= 0) | (
                state.delta.find(item_key) >= 0
            )
            return found

    def attributes(self, item_key: Keys) -> Attributes:
        """What the index knows of items [N]; unknown for those that are not there."""
        found = Attributes.unknown(len(item_key))
        with self._write:
            for segment in (self._state.base, self._state.delta):
                rows = segment.find(item_key)
                found.put(np.flatnonzero(rows >= 0), segment.attributes.take(rows[rows >= 0]))
        return found

    def upsert(self, item_key: Keys, vectors: Vectors, attributes: Attributes | None = None) -> None:
        """Add or replace items. keys [N], vectors [N, D]; of a repeated key the last one counts.

        Visible to every search that begins after the return. attributes None: unknown, also for items that were there.
        Raises: VersionMismatch for another dimension; BadInput for vectors that are not finite; Overloaded when the
        delta is full, until the rebuild that has been started is done.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise other_dimension(f"vectors of shape {vectors.shape}", self.dim)
        known = Attributes.unknown(len(item_key)) if attributes is None else attributes
        if not len(item_key) == len(vectors) == len(known) or not np.isfinite(vectors).all():
            raise BadInput(
                "live index, upsert",
                came=f"{len(item_key)} keys, {len(vectors)} vectors, {len(known)} attributes, or NaN among them",
                expected="one finite vector and one row of attributes per key",
                fix="Look at what encodes the items.",
            )
        last = len(item_key) - 1 - np.unique(item_key[::-1], return_index=True)[1]
        with self._write:
            state = self._state
            if state.delta.count + len(last) > state.delta.capacity:
                self._start_rebuild()
                raise Overloaded(
                    "live index, upsert",
                    came=f"{len(last)} items beside {state.delta.count} changed ones",
                    expected=f"at most {state.delta.capacity} between two rebuilds",
                    fix="Try again when the rebuild is done, or raise models.index.live.delta_items_max.",
                )
            state.delta.append(item_key[last], vectors[last], known.take(last))
            state.base.kill(_present(state.base.find(item_key[last])))
            self._note(item_key[last])
        self._rebuild_if_due()

    def move(self, item_key: Keys, vectors: Vectors) -> int:
        """New vectors [N, D] of distinct items; attributes stay, and items that are not there stay away.

        Gives how many were there. Raises: as `upsert`.
        """
        with self._write:
            state = self._state
            base, delta = state.base.find(item_key), state.delta.find(item_key)
            at = np.concatenate([np.flatnonzero(base >= 0), np.flatnonzero(delta >= 0)])
            known = Attributes.concat(
                state.base.attributes.take(_present(base)), state.delta.attributes.take(_present(delta))
            )
            self.upsert(item_key[at], vectors[at], known)
        return len(at)

    def delete(self, item_key: Keys) -> int:
        """Remove items; no search that begins after the return gives them. Gives how many were there."""
        with self._write:
            state = self._state
            base = _present(state.base.find(np.unique(item_key)))
            delta = _present(state.delta.find(np.unique(item_key)))
            state.base.kill(base)
            state.delta.kill(delta)
            self._note(item_key)
        self._rebuild_if_due()
        return len(base) + len(delta)

    def update(
        self,
        item_key: Keys,
        *,
        price_minor: npt.NDArray[np.int64] | None = None,
        stock_units: npt.NDArray[np.int64] | None = None,
    ) -> int:
        """Prices and units in stock [N] of distinct items, in place; None = as they were. Gives how many were there.

        A sold-out item leaves at once and comes back when it has stock again.
        """
        with self._write:
            state, total = self._state, 0
            for segment in (state.base, state.delta):
                rows = segment.find(item_key)
                here = rows >= 0
                values = segment.attributes.take(rows[here])
                if price_minor is not None:
                    values.price_minor[:] = price_minor[here]
                if stock_units is not None:
                    values.stock_units[:] = stock_units[here]
                segment.update(rows[here], values)
                total += len(values)
            if self._touched is not None:
                self._touched.update(item_key.tolist())
        return total

    def capture(self) -> tuple[AnnIndex, Attributes, RowSet, Keys, Vectors, Attributes]:
        """One moment of the index: base, its attributes, its living rows; keys, vectors, attributes of the delta."""
        with self._write:
            base, delta = self._state.base, self._state.delta
            rows = np.flatnonzero(delta.alive[: delta.count])
            return (
                base.index, base.attributes.take(slice(None)), base.alive.copy(),
                delta.item_key[rows], delta.vectors[rows], delta.attributes.take(rows),
            )  # fmt: skip

    def restore(self, alive: RowSet, item_key: Keys, vectors: Vectors, attributes: Attributes) -> None:
        """Bring a fresh index to a captured moment."""
        with self._write:
            self._state.base.kill(np.setdiff1d(np.arange(len(self._state.base.index)), alive.rows()))
        if len(item_key):
            self.upsert(item_key, vectors, attributes)

    def rebuild(self, *, retrain: bool | None = None) -> None:
        """Build a new base from what is alive and swap it in, in this thread. Searches and writes go on meanwhile.

        retrain: quantizers and parameters anew; None = when retrain_share of the items has changed since.
        """
        with self._one_rebuild:
            self._rebuild(retrain)

    def _rebuild(self, retrain: bool | None) -> None:
        started = time.monotonic()
        with self._write:
            state, self._touched = self._state, set()
            base_rows, upto = state.base.alive.rows(), state.delta.count
            delta_rows = np.flatnonzero(state.delta.alive[:upto])
            known = Attributes.concat(state.base.attributes.take(base_rows), state.delta.attributes.take(delta_rows))
            item_key = np.concatenate([state.base.index.row_key[base_rows], state.delta.item_key[delta_rows]])
            changed = self._changed_since_training
        if retrain is None:
            retrain = changed > self._live.retrain_share * max(len(item_key), 1)
        try:
            vectors = np.concatenate(
                [state.base.index.engine.vectors.take(base_rows, axis=0), state.delta.vectors[delta_rows]]
            )
            built = AnnIndex.build(item_key, vectors, self._config, like=None if retrain else state.base.index)
            del vectors
            order = np.argsort(item_key)[np.searchsorted(np.sort(item_key), built.row_key)]
            self._swap(state, self._fresh(built, known.take(order)), upto)
        finally:
            with self._write:
                self._touched = None
        if retrain:
            self._changed_since_training -= changed
        metrics.INDEX_REBUILDS.labels("done").inc()
        _log.info("index_rebuilt", items=len(built), retrained=retrain, took_s=round(time.monotonic() - started, 2))

    def _swap(self, old: State, new: State, upto: int) -> None:
        """Put the new state in force, with what was written since its copy was taken."""
        with self._write:
            assert self._touched is not None, "writers note what they touch while a rebuild runs"
            touched = np.fromiter(self._touched, np.int64, len(self._touched))
            late = upto + np.flatnonzero(old.delta.alive[upto : old.delta.count])
            new.delta.append(old.delta.item_key[late], old.delta.vectors[late], old.delta.attributes.take(late))
            in_base, in_delta = old.base.find(touched), old.delta.find(touched)
            gone = (in_base < 0) & ((in_delta < 0) | (in_delta >= upto))
            new.base.kill(_present(new.base.find(touched[gone])))
            for segment, rows in ((old.base, in_base), (old.delta, in_delta)):
                kept = (rows >= 0) & ~gone
                new.base.update(new.base.find(touched[kept]), segment.attributes.take(rows[kept]))
            self._state = new

    def wait_rebuilt(self, timeout_s: float | None = None) -> bool:
        """Wait for a rebuild in the background; True when none is running any more."""
        thread = self._rebuilding
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def report(self) -> None:
        """Bring the gauges up to date."""
        state = self._state
        metrics.INDEX_ITEMS.labels("base").set(state.base.num_alive)
        metrics.INDEX_ITEMS.labels("delta").set(len(state.delta))
        metrics.INDEX_ITEMS.labels("dead").set(len(state.base.index) - state.base.num_alive)

    def _note(self, item_key: Keys) -> None:
        self._changed_since_training += len(item_key)
        if self._touched is not None:
            self._touched.update(item_key.tolist())

    def _due(self) -> bool:
        base, delta = self._state.base, self._state.delta
        dead = len(base.index) - base.num_alive
        return delta.count >= self._live.rebuild_items or dead > self._live.rebuild_dead_share * max(len(base.index), 1)

    def _rebuild_if_due(self) -> None:
        if self._due():
            self._start_rebuild()

    def _start_rebuild(self) -> None:
        with self._write:
            running = self._rebuilding is not None and self._rebuilding.is_alive()
            if not running and time.monotonic() >= self._rebuild_not_before_s:
                self._rebuilding = threading.Thread(target=self._rebuild_quietly, name="index-rebuild", daemon=True)
                self._rebuilding.start()

    def _rebuild_quietly(self) -> None:
        yield_cores(self._live.rebuild_threads)
        try:
            while True:
                self.rebuild()
                with self._write:  # what came meanwhile may be enough for the next one
                    if not self._due():
                        self._rebuilding = None
                        return
        except (MemoryError, RuntimeError) as error:  # RuntimeError: FAISS; the old state goes on serving
            self._rebuild_not_before_s = time.monotonic() + _RETRY_S
            metrics.INDEX_REBUILDS.labels("failed").inc()
            _log.error("index_rebuild_failed", error=str(error).splitlines()[0] if str(error) else repr(error))


def _search(state: State, queries_BD: Vectors, k: int, where: Where, *, exact: bool) -> tuple[Keys, Vectors]:
    base = state.base.exact(queries_BD, k, where) if exact else state.base.search(queries_BD, k, where)
    floor_B = np.where(base[0] < 0, -np.inf, base[1]).min(axis=1, initial=np.inf).astype(np.float32)
    delta = state.delta.search(queries_BD, k, where, None if exact else floor_B)  # after the base, see segments.py
    newer = set(delta[0].ravel().tolist()) - {-1}
    if not newer:
        return merge([base], k)
    if not newer.isdisjoint(base[0].ravel().tolist()):  # replaced while we looked: the newer row is the item's
        delta = state.delta.search(queries_BD, k, where)  # a place is free: what did not reach the floor may take it
        base = np.where((delta[0][:, :, None] == base[0][:, None, :]).any(axis=1), -1, base[0]), base[1]
    return merge([delta, base], k)


def _present(rows: Rows) -> Rows:
    return rows[rows >= 0]
