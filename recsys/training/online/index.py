"""What the indexes that online training keeps going have in common: actions in, rows that they change out.

Rows wait for their turn, who waits longest first, and a bounded number is made a step. Commits hold values, not
differences. Shape legend: A actions of a step, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl

from recsys.core.index_rows import IndexRows
from recsys.training.online.journal import Arrays

Keys = npt.NDArray[np.int64]
_MADE = {"key": np.int64, "num": np.int64, "entry_key": np.int64, "score": np.float32}


class OnlineIndex(ABC):
    """One index of a run, going on. A step: `tell`, `make`, then `arrays` for its commit."""

    NAME: ClassVar[str]
    FILE: ClassVar[str]  # of the run, where it goes on from

    def __init__(self, rows_max: int) -> None:
        """rows_max: rows made in a step."""
        self._rows_max = rows_max
        self._waiting: dict[int, None] = {}
        self._step: Arrays = {}

    def tell(self, user: Keys, item_key: Keys, interest: npt.NDArray[np.float32], time_us: Keys) -> None:
        """Take in the actions of a step [A]; those that are known change nothing.

        interest: `behaviour.WEIGHT` of each; what has none is left out.
        """
        some = interest > 0
        self._step = self._told(user[some], item_key[some], interest[some], time_us[some])
        self._take(self._step)

    def make(self) -> None:
        """Make the rows that have waited longest."""
        wanted = np.fromiter(self._waiting, np.int64, len(self._waiting))[: self._rows_max]
        made = self._made(wanted)
        self._step |= {name: getattr(made, name) for name in _MADE}
        self._done(wanted)

    def arrays(self, *, whole: bool) -> Arrays:
        """What a commit holds: what the step changed, or everything since the run, and the rows that it made."""
        step = self._step
        if whole:
            waiting = np.fromiter(self._waiting, np.int64, len(self._waiting))
            step = {name: step[name] for name in _MADE} | self._changed() | {"waiting": waiting}
        return {f"{self.NAME}.{name}": values for name, values in step.items()}

    def restore(self, arrays: Arrays) -> None:
        """Go on from what `arrays` gave. Commits of a trainer that did not keep this index have none of it."""
        step = {n.removeprefix(f"{self.NAME}."): a for n, a in arrays.items() if n.startswith(f"{self.NAME}.")}
        if step:
            self._take(step)
            self._done(step["key"])

    @classmethod
    def made_in(cls, arrays: Arrays) -> IndexRows | None:
        """The rows that a commit made, if any."""
        if not len(arrays.get(f"{cls.NAME}.key", ())):
            return None
        return IndexRows(**{name: arrays[f"{cls.NAME}.{name}"] for name in _MADE})

    @abstractmethod
    def _told(self, user: Keys, item_key: Keys, interest: npt.NDArray[np.float32], time_us: Keys) -> Arrays:
        """What actions change, for `_take`; `waiting` is the keys of rows to make again, ascending."""

    @abstractmethod
    def _hold(self, step: Arrays) -> None:
        """Put what `_told` or `_changed` gave in force."""

    @abstractmethod
    def _made(self, wanted: Keys) -> IndexRows:
        """These rows as they are now."""

    @abstractmethod
    def _changed(self) -> Arrays:
        """Everything that differs from the run."""

    def _take(self, step: Arrays) -> None:
        self._hold(step)
        self._waiting |= dict.fromkeys(step["waiting"].tolist())

    def _done(self, keys: Keys) -> None:
        for key in keys.tolist():
            self._waiting.pop(key, None)


def columns_of(of: str, table: pl.DataFrame) -> Arrays:
    """A table as arrays of a commit."""
    return {f"{of}.{name}": table[name].to_numpy() for name in table.columns}


def table_in(step: Arrays, of: str, schema: Mapping[str, pl.DataType | type[pl.DataType]]) -> pl.DataFrame:
    """The table that `columns_of` gave."""
    return pl.DataFrame({name: step[f"{of}.{name}"] for name in schema}, schema=schema)


def remembered(told: pl.DataFrame, new: pl.DataFrame, users_max: int) -> pl.DataFrame:
    """Rows of one `user` together: new ones in place of those they had, at the end; who was told longest ago goes."""
    rows = pl.concat([told.filter(~pl.col("user").is_in(new["user"].implode())), new])
    user = rows["user"].rle_id().to_numpy().astype(np.int64)
    return rows.filter(user > user.max(initial=0) - users_max)


def rows_of_table(key: Keys, owner: Keys, entry_key: Keys, score: npt.NDArray[np.float32]) -> IndexRows:
    """Entries of owners [E], together and ascending, as rows of the keys [R], ascending; of some there may be none."""
    num = np.bincount(np.searchsorted(key, owner), minlength=len(key)).astype(np.int64)
    return IndexRows(key=key, num=num, entry_key=entry_key, score=score)


def joined(parts: list[IndexRows]) -> IndexRows:
    """Rows of several calls; none of none."""
    made = {n: np.concatenate([np.empty(0, dtype), *(getattr(p, n) for p in parts)]) for n, dtype in _MADE.items()}
    return IndexRows(**made)
