"""[heavy] The two parts of a live index: a base that is built once, and a delta that is scanned exactly.

Writers change bits and numbers in place, one at a time; readers take no lock. What a reader must see together is
ordered by the writer: a new row of the delta counts only once it is whole, and the row that it replaces dies after
that. So a reader that asks the base first and the delta second meets every item at least once; twice is mended by the
live index. Shape legend: M base rows, N delta rows, B queries, D dimension, K neighbours.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

import numpy as np

from recsys.candidates.nearest.base import Keys, Vectors
from recsys.candidates.nearest.exact import Found, best, exact_search, padded, products
from recsys.candidates.nearest.rows import Rows, RowSet
from recsys.candidates.nearest.static import AnnIndex
from recsys.core.attributes import Attributes, Mask, Where

_QUERIES_PER_BLOCK, _LOOKS_MAX = 64, 3
_REACHING_MAX = 2_048  # rows of a delta per query, each looked at by itself


class BaseSegment:
    """An AnnIndex, which of its rows are alive, and what is known of them."""

    def __init__(self, index: AnnIndex, attributes: Attributes, alive: RowSet, filters_max: int) -> None:
        """attributes: [M] in the order of the index's rows."""
        self.index, self.attributes, self.alive = index, attributes, alive
        self._on_sale = alive & RowSet.where(attributes.on_sale())
        self._compiled: OrderedDict[object, tuple[Where, RowSet]] = OrderedDict()
        self._filters_max, self._version = filters_max, 0
        self._filters = threading.Lock()  # held for microseconds: to put a filter in, to patch those that are there
        self.num_alive, self._num_on_sale = len(alive), len(self._on_sale)

    def find(self, item_key: Keys) -> Rows:
        """Row of each key [N] that is alive here, else -1."""
        rows = self.index.rows_of(item_key)
        rows[~self.alive.has(rows)] = -1
        return rows

    def kill(self, rows: Rows) -> None:
        """These rows are no longer the item's: it is deleted, or its newer row is in the delta."""
        self.alive.remove(rows)
        self._on_sale.remove(rows)
        self._count()

    def update(self, rows: Rows, values: Attributes) -> None:
        """New attributes of rows; filters that are compiled follow."""
        with self._filters:
            self._version += 1
            self.attributes.put(rows, values)
            for where, compiled in self._compiled.values():
                compiled.put(rows, where.matches(values))
        self._on_sale.put(rows, values.on_sale() & self.alive.has(rows))
        self._count()

    def _count(self) -> None:
        """By the writer, before its call returns, so that no reader has to."""
        self.num_alive, self._num_on_sale = len(self.alive), len(self._on_sale)

    def allowed(self, where: Where) -> tuple[RowSet | None, int]:
        """Rows that may come back now, None = all of them, and how many."""
        visible, num_visible = (self.alive, self.num_alive) if where.sold_out else (self._on_sale, self._num_on_sale)
        if where.allow is not None:
            rows = self.find(np.unique(where.allow))
            rows = rows[rows >= 0]
            some = RowSet.of(len(self.index), rows[where.matches(self.attributes.take(rows))]) & visible
            return some, len(some)
        if where.predicate is not None:
            some = self._compile(where) & visible
            return some, len(some)
        return (None if num_visible == len(self.index) else visible), num_visible

    def search(self, queries_BD: Vectors, k: int, where: Where) -> Found:
        """Keys and scores; whatever died while we looked is left out."""
        rows, scores = self.index.search_rows(queries_BD, k, *self.allowed(where))
        rows = np.where(self.alive.has(rows), rows, -1)
        return self.index.keys_of(rows), scores

    def exact(self, queries_BD: Vectors, k: int, where: Where) -> Found:
        """The same by the exact scan."""
        allowed, _ = self.allowed(where)
        rows, scores = exact_search(
            self.index.engine.vectors, queries_BD, k, None if allowed is None else allowed.rows()
        )
        return self.index.keys_of(rows), scores

    def _compile(self, where: Where) -> RowSet:
        """Rows that match a predicate, remembered and kept up to date by `update`."""
        name = where.predicate
        held = self._compiled.get(name)
        if held is not None:
            return held[1]
        bare = replace(where, allow=None, sold_out=False)
        version = self._version
        compiled = RowSet.where(bare.matches(self.attributes))
        with self._filters:
            if version == self._version:  # else a price changed meanwhile: right for now, not to be remembered
                self._compiled[name] = bare, compiled
                while len(self._compiled) > self._filters_max:
                    self._compiled.popitem(last=False)
        return compiled


class DeltaSegment:
    """New and changed items: at most `capacity` rows, appended, never moved."""

    def __init__(self, dim: int, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self.vectors: Vectors = np.empty((capacity, dim), np.float32)
        self.item_key = np.empty(capacity, np.int64)
        self.attributes = Attributes.unknown(capacity)
        self.alive: Mask = np.zeros(capacity, np.bool_)
        self._row_by_key: dict[int, int] = {}

    def __len__(self) -> int:
        """Items alive here."""
        return len(self._row_by_key)

    def find(self, item_key: Keys) -> Rows:
        """Row of each key [N] that is alive here, else -1."""
        held = self._row_by_key
        return np.fromiter((held.get(k, -1) for k in item_key.tolist()), np.int64, len(item_key))

    def append(self, item_key: Keys, vectors: Vectors, attributes: Attributes) -> None:
        """Rows for distinct keys; an older row of a key dies once the new one counts. The caller checks the room."""
        start, end = self.count, self.count + len(item_key)
        older = self.find(item_key)
        self.item_key[start:end], self.vectors[start:end] = item_key, vectors
        self.attributes.put(slice(start, end), attributes)
        self.alive[start:end] = True
        self.count = end
        self.alive[older[older >= 0]] = False
        self._row_by_key.update(zip(item_key.tolist(), range(start, end), strict=True))

    def kill(self, rows: Rows) -> None:
        """The items of these rows are deleted."""
        self.alive[rows] = False
        for item_key in self.item_key[rows].tolist():
            del self._row_by_key[item_key]

    def update(self, rows: Rows, values: Attributes) -> None:
        """New attributes of rows."""
        self.attributes.put(rows, values)

    def _alive_now(self) -> tuple[Mask, int]:
        """Who is alive, and the count, of one moment: a row that died for a newer one must find that counted."""
        for _ in range(_LOOKS_MAX):
            count = self.count
            alive = self.alive[:count].copy()
            if self.count == count:
                return alive, count
        alive = self.alive.copy()  # the count only grows: read after the copy, it holds all that killed in it
        count = self.count
        return alive[:count], count

    def search(self, queries_BD: Vectors, k: int, where: Where, floor_B: Vectors | None = None) -> Found:
        """Keys and scores of the exact scan, over the rows that count now.

        floor_B: the score that k items elsewhere have, -inf where there are fewer. Few rows of a delta reach it, and
        nothing but the product has to be worked out for the others.
        """
        alive, count = self._alive_now()
        if not count:
            return padded((np.empty((len(queries_BD), 0), np.int64), np.empty((len(queries_BD), 0), np.float32)), k)
        out = np.empty((len(queries_BD), k), np.int64), np.empty((len(queries_BD), k), np.float32)
        for at in range(0, len(queries_BD), _QUERIES_PER_BLOCK):
            block = slice(at, at + _QUERIES_PER_BLOCK)
            found = None if floor_B is None else self._above(floor_B[block], queries_BD[block], k, where, alive)
            out[0][block], out[1][block] = found or self._of_all(queries_BD[block], k, where, alive)
        return out

    def _above(self, floor_B: Vectors, queries_BD: Vectors, k: int, where: Where, alive: Mask) -> Found | None:
        """What reaches the floor; None where that is too much to look at one by one."""
        if np.isneginf(floor_B).any():
            return None
        scores_BN = products(queries_BD, self.vectors[: len(alive)])
        reaches = scores_BN >= floor_B[:, None]
        if np.count_nonzero(reaches) > _REACHING_MAX * len(floor_B):
            return None
        query, row = np.nonzero(reaches)
        passed = alive[row] & _passing(self.attributes.take(row), self.item_key[row], where)
        query, row = query[passed], row[passed]
        score = scores_BN[query, row]
        order = np.lexsort((-score, query))
        query, row, score = query[order], row[order], score[order]
        place = np.arange(len(query)) - np.searchsorted(query, query)
        first = place < k
        item_key, scores = np.full((len(floor_B), k), -1), np.full((len(floor_B), k), -np.inf, np.float32)
        item_key[query[first], place[first]] = self.item_key[row[first]]
        scores[query[first], place[first]] = score[first]
        return item_key, scores

    def _of_all(self, queries_BD: Vectors, k: int, where: Where, alive: Mask) -> Found:
        count = len(alive)
        passed = alive & _passing(self.attributes.view(count), self.item_key[:count], where)
        rows = np.flatnonzero(passed)
        few = 4 * len(rows) < count
        vectors = self.vectors[:count].take(rows, axis=0) if few else self.vectors[:count]
        scores = products(queries_BD, vectors)
        if not few and len(rows) < count:
            scores += np.where(passed, np.float32(0), np.float32(-np.inf))
        place, score = best(scores, k)
        row = rows[place] if few else place
        return padded((np.where(np.isneginf(score), -1, self.item_key[row]), score), k)


def _passing(items: Attributes, item_key: Keys, where: Where) -> Mask:
    passed = where.admits(item_key, items)
    return passed if where.sold_out else passed & items.on_sale()
