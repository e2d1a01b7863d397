"""Columns of a batch that views read, and the rows that they add.

Shape legend: N events or new rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.state import Words
from recsys.core import EventBatch, EventKind, keys

EntityKind = Literal["user", "item"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EventColumns:
    """N events as NumPy columns; users and items are rows of `user_ids` and `item_ids`, -1 = none.

    event_key is the 64-bit key of the event id: it breaks ties between equal event times and tells repeats.
    price, quantity, stock, listed, category and brand are -1 where the event does not say.
    """

    kind: Words
    event_type: Words
    time_us: Words
    event_key: Words
    user_ids: list[str]
    user_code: Words
    item_ids: list[str]
    item_code: Words
    item_key: Words
    price: Words
    quantity: Words
    stock: Words
    listed: Words
    category: Words
    brand: Words

    @classmethod
    def of(cls, batch: EventBatch) -> EventColumns:
        """The columns of a batch."""
        table = batch.table
        user_ids, user_code = _coded(table.column("user_id"))
        item_ids, item_code = _coded(table.column("item_id"))
        return cls(
            kind=batch.numpy("kind").astype(np.int64),
            event_type=batch.numpy("event_type").astype(np.int64),
            time_us=batch.numpy("event_time"),
            event_key=keys(table.column("event_id").to_pylist()),
            user_ids=user_ids,
            user_code=user_code,
            item_ids=item_ids,
            item_code=item_code,
            item_key=np.append(keys(item_ids), -1)[item_code],
            price=_numbers(table.column("price")),
            quantity=_numbers(table.column("quantity")),
            stock=_numbers(table.column("stock")),
            listed=_numbers(table.column("listed").cast(pa.int64())),
            category=_keyed(table.column("category")),
            brand=_keyed(table.column("brand")),
        )

    def __len__(self) -> int:
        return len(self.kind)

    def code(self, kind: EntityKind) -> Words:
        """Entity of each event [N] of one kind."""
        return self.user_code if kind == "user" else self.item_code

    def where(self, keep: npt.NDArray[np.bool_]) -> EventColumns:
        """The events where keep [N] is true; ids and codes stay."""
        columns: dict[str, Any] = {n: v[keep] for n in self.__slots__ if isinstance(v := getattr(self, n), np.ndarray)}
        return replace(self, **columns)

    @property
    def is_action(self) -> npt.NDArray[np.bool_]:
        """Events of a user on an item, impressions included."""
        return np.asarray((self.kind == EventKind.ACTION) & (self.user_code >= 0) & (self.item_code >= 0))


@dataclass(frozen=True, slots=True)
class NewRows:
    """Rows that a batch adds to one table: code [N] = entity, words [N, C]."""

    code: Words
    words: Words

    @classmethod
    def of(cls, code: Words, *columns: Words | int) -> NewRows:
        """From one array or constant per column."""
        words = np.empty((len(columns), len(code)), np.int64)
        for c, column in enumerate(columns):
            words[c] = column
        return cls(code, words.T)

    @classmethod
    def concat(cls, parts: Iterable[NewRows]) -> NewRows:
        """All rows of all parts."""
        parts = list(parts)
        return cls(np.concatenate([p.code for p in parts]), np.concatenate([p.words.T for p in parts], axis=1).T)


def _coded(column: pa.ChunkedArray) -> tuple[list[str], Words]:
    coded = column.combine_chunks().dictionary_encode()
    return coded.dictionary.to_pylist(), _numbers(coded.indices)


def _numbers(column: pa.ChunkedArray | pa.Array) -> Words:
    numbers: Words = pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    return numbers


def _keyed(column: pa.ChunkedArray) -> Words:
    ids, code = _coded(column)
    keyed: Words = np.append(keys(ids), -1)[code]
    return keyed
