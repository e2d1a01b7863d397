"""ItemTable: a run's items.parquet in memory; keys, ids and attributes as columns sorted by key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.errors import CorruptData
from recsys.core.ids import find_rows

ITEM_TABLE_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("item_key", pa.int64(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("category", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("price", pa.int64()),  # minor units, as first known
        pa.field("available_from", pa.int64()),  # microseconds UTC; null for a static catalogue
        pa.field("attributes", pa.string()),  # JSON object
    ]
)


@dataclass(frozen=True, slots=True)
class ItemTable:
    """M items sorted by key. item_key: int64 [M]; `table` holds the ITEM_TABLE_SCHEMA columns in the same order."""

    item_key: npt.NDArray[np.int64]
    table: pa.Table

    @classmethod
    def from_table(cls, table: pa.Table) -> ItemTable:
        """From rows in any order with ITEM_TABLE_SCHEMA's columns (missing nullable ones are filled with null)."""
        columns = []
        for f in ITEM_TABLE_SCHEMA:
            present = f.name in table.column_names
            columns.append(table.column(f.name).cast(f.type) if present else pa.nulls(table.num_rows, f.type))
        table = pa.table(columns, schema=ITEM_TABLE_SCHEMA).sort_by("item_key").combine_chunks()
        return cls(table.column("item_key").to_numpy(), table)

    @classmethod
    def read(cls, path: Path) -> ItemTable:
        """Read items.parquet. Raises: CorruptData for a file that is not Parquet or lacks the id columns."""
        try:
            table = pq.read_table(path)
            if table.column("item_id").null_count or table.column("item_key").null_count:
                raise pa.ArrowInvalid("null in item_id or item_key")
            return cls.from_table(table)
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise CorruptData(
                str(path), came=str(error), expected=f"Parquet with {ITEM_TABLE_SCHEMA.names}", fix="Train again."
            ) from error

    def write(self, path: Path) -> None:
        """Write items.parquet."""
        pq.write_table(self.table, path)

    def __len__(self) -> int:
        return len(self.item_key)

    def where(self, mask: npt.NDArray[np.bool_]) -> ItemTable:
        """The items at which mask [M] is true."""
        return ItemTable(self.item_key[mask], self.table.filter(pa.array(mask)).combine_chunks())

    def rows(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each key [N]; -1 for a key the run does not know."""
        return find_rows(self.item_key, item_key)

    def values(self, name: str, item_key: npt.NDArray[np.int64]) -> list[Any]:
        """Values of one column for the keys, None where unknown or null."""
        rows = self.rows(item_key)
        values: list[Any] = self.table.column(name).take(pa.array(rows, mask=rows < 0)).to_pylist()
        return values

    def ids(self, item_key: npt.NDArray[np.int64]) -> list[str | None]:
        """Item ids of the keys, None for unknown keys."""
        return self.values("item_id", item_key)

    def column(self, name: str) -> list[Any]:
        """A whole column as Python values, in key order."""
        values: list[Any] = self.table.column(name).to_pylist()
        return values
