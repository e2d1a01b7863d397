"""Rows: what an index has for a key, an item's links or a category's list. As the run wrote them, or newer.

Online training makes rows again while they are asked; what it sends comes first, whole rows at a time.

Shape legend: M keys, K keys of a call, E entries of all of these.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.core.ids import find_rows
from recsys.core.index_rows import IndexRows

Row = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def gather(
    start: npt.NDArray[np.int64], row: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of all entries of the given rows of a CSR layout, and how many each row has."""
    begin, count = start[row], start[row + 1] - start[row]
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(begin, count) + within, count


def rows_of(
    sorted_key: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Row of each wanted key in ascending keys, for those that are there, and which are."""
    row = find_rows(sorted_key, wanted)
    known = row >= 0
    return row[known], known


class FreshRows:
    """Rows made since the run, by index. Whoever puts them in may be another thread than who asks."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, Row]] = {}

    def put(self, index: str, rows: IndexRows) -> None:
        """Take rows in; the newest of a key stands."""
        of_index = self._rows.setdefault(index, {})
        stop = np.cumsum(rows.num)
        for key, begin, end in zip(rows.key.tolist(), (stop - rows.num).tolist(), stop.tolist(), strict=True):
            of_index[key] = rows.entry_key[begin:end].copy(), rows.score[begin:end].copy()

    def of(self, index: str) -> Mapping[int, Row]:
        """Entries and scores by key, of one index; grows while it is held."""
        return self._rows.setdefault(index, {})

    def __len__(self) -> int:
        """Rows of all indexes."""
        return sum(map(len, self._rows.values()))


def newer_rows(fresh: FreshRows | None, index: str) -> Mapping[int, Row]:
    """Where newer rows of an index are or will be; none where nobody follows online training."""
    return {} if fresh is None else fresh.of(index)


class RowTable:
    """Rows of a table, newer ones in their place."""

    def __init__(self, table: pa.Table, newer: Mapping[int, Row]) -> None:
        """table: three columns, key (ascending), entry and score, best entry first."""
        key, entry, score = (table.column(i).to_numpy() for i in range(3))
        self._entry, self._score, self._newer = entry, score, newer
        self._key, start = np.unique(key, return_index=True)
        self._start = np.append(start, len(key))

    def weighted(
        self, key: npt.NDArray[np.int64], weight: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
        """All entries of the keys [K], and their scores times the weights of these [E]."""
        rows = [self._newer.get(k) for k in key.tolist()] if self._newer else []
        newer = [(row, w) for row, w in zip(rows, weight, strict=False) if row is not None]
        if newer:
            old = np.array([row is None for row in rows])
            key, weight = key[old], weight[old]
        row, known = rows_of(self._key, key)
        edge, count = gather(self._start, row)
        score = self._score[edge] * np.repeat(weight[known], count)
        entry = self._entry[edge]
        if newer:
            entry = np.concatenate([entry, *(entries for (entries, _), _ in newer)])
            score = np.concatenate([score, *(scores * w for (_, scores), w in newer)])
        return entry, score
