"""What a FeatureView is.

Shape legend: E entities, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_store.base import FeatureStatus
from feature_store.columns import EntityKind, EventColumns, NewRows
from feature_store.state import State, Table, Words


@dataclass(frozen=True, slots=True)
class Values:
    """Scalar features of E entities. number: float64 [E, F], NaN unless PRESENT; status int8 [E, F]; time_us [E, F]:
    event time of the newest event behind the value, 0 = none.
    """

    number: npt.NDArray[np.float64]
    status: npt.NDArray[np.int8]
    time_us: Words

    @classmethod
    def concat(cls, parts: Iterable[Values]) -> Values:
        """Features side by side."""
        parts = list(parts)
        return cls(
            np.concatenate([p.number for p in parts], axis=1),
            np.concatenate([p.status for p in parts], axis=1),
            np.concatenate([p.time_us for p in parts], axis=1),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureView:
    """One declared group of features of a kind of entity.

    version: raise it when the meaning of a table or value changes without its declaration changing.
    tables: the state. rows(events): what a batch adds, by table name.
    features: names of the scalar values; values(state, as_of_us): number and time [E, F], NaN = NULL.
    max_age_us: values whose newest event is older at the time of reading are OUTSIDE_MAX_AGE; None = never.
    """

    name: str
    version: int
    kind: EntityKind
    tables: tuple[Table, ...]
    rows: Callable[[EventColumns], dict[str, NewRows]]
    features: tuple[str, ...] = ()
    values: Callable[[State, int], tuple[npt.NDArray[np.float64], Words]] | None = None
    max_age_us: int | None = None

    def read(self, state: State, as_of_us: int, known: npt.NDArray[np.bool_]) -> Values:
        """Values and statuses of E entities as of a time; known [E] tells entities that exist."""
        shape = (len(known), len(self.features))
        if self.values is None:
            return Values(np.empty(shape), np.empty(shape, np.int8), np.empty(shape, np.int64))
        number, time_us = self.values(state, as_of_us)
        status = np.full(shape, FeatureStatus.PRESENT, np.int8)
        status[np.isnan(number)] = FeatureStatus.NULL
        if self.max_age_us is not None:
            old = (status == FeatureStatus.PRESENT) & (time_us < as_of_us - self.max_age_us)
            status[old] = FeatureStatus.OUTSIDE_MAX_AGE
        status[~known] = FeatureStatus.NOT_FOUND
        number[status != FeatureStatus.PRESENT] = np.nan
        return Values(number, status, time_us)


@dataclass(frozen=True, slots=True)
class Views:
    """All views of one kind of entity; their tables together are its state."""

    kind: EntityKind
    views: tuple[FeatureView, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Every table, in the order of the packed form."""
        return tuple(t for v in self.views for t in v.tables)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Every scalar feature."""
        return tuple(f for v in self.views for f in v.features)

    def rows(self, events: EventColumns) -> dict[str, NewRows]:
        """What a batch adds, by table name."""
        return {name: rows for v in self.views for name, rows in v.rows(events).items()}

    def read(self, state: State, as_of_us: int) -> Values:
        """Scalar values of E entities in the order of `feature_names`. An entity without a `life` row is NOT_FOUND."""
        known = state["life"].counts > 0
        return Values.concat(v.read(state, as_of_us, known) for v in self.views)

    def declaration(self) -> str:
        """Text that changes when the meaning of stored state or of a value changes."""
        return repr([(v.name, v.version, v.tables, v.features, v.max_age_us) for v in self.views])


def version_of(*kinds: Views) -> str:
    """Version of a view set: 12 hex digits of the SHA-256 of all declarations."""
    return hashlib.sha256("\n".join(k.declaration() for k in kinds).encode()).hexdigest()[:12]
