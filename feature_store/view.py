"""What a FeatureView is.

Shape legend: E entities, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from feature_store.base import FeatureStatus
from feature_store.columns import EntityKind, EventColumns, NewRows
from feature_store.state import FORMAT, State, Table, Words


@dataclass(frozen=True, slots=True)
class Values:
    """Scalar features of E entities. number: float64 [E, F], NaN unless PRESENT; status int8 [E, F]."""

    number: npt.NDArray[np.float64]
    status: npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureView:
    """One declared group of features of a kind of entity.

    version: raise it when the meaning of a table or value changes without its declaration changing.
    tables: the state. rows(events): what a batch adds, by table name.
    features: names of the scalar values; values(state, as_of_us): numbers [E, F], NaN = NULL; times(state): event time
    of the newest event behind each [E, F], 0 = none.
    max_age_us: values whose newest event is older at the time of reading are OUTSIDE_MAX_AGE; None = never.
    """

    name: str
    version: int
    kind: EntityKind
    tables: tuple[Table, ...]
    rows: Callable[[EventColumns], dict[str, NewRows]]
    features: tuple[str, ...]
    values: Callable[[State, int], npt.NDArray[np.float64]]
    times: Callable[[State], Words]
    max_age_us: int | None = None

    def read(self, state: State, as_of_us: int, known: npt.NDArray[np.bool_]) -> Values:
        """Values and statuses of E entities as of a time; known [E] tells entities that exist."""
        number = self.values(state, as_of_us)
        status = np.isnan(number).view(np.int8) + np.int8(FeatureStatus.PRESENT)  # NULL is the one after PRESENT
        if self.max_age_us is not None:
            old = (status == FeatureStatus.PRESENT) & (self.times(state) < as_of_us - self.max_age_us)
            status[old], number[old] = FeatureStatus.OUTSIDE_MAX_AGE, np.nan
        if not known.all():
            status[~known], number[~known] = FeatureStatus.NOT_FOUND, np.nan
        return Values(number, status)


@dataclass(frozen=True)
class Views:
    """All views of one kind of entity; their tables together are its state."""

    kind: EntityKind
    views: tuple[FeatureView, ...]

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """Every table, in the order of the packed form."""
        return tuple(t for v in self.views for t in v.tables)

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Every scalar feature."""
        return tuple(f for v in self.views for f in v.features)

    def rows(self, events: EventColumns) -> dict[str, NewRows]:
        """What a batch adds, by table name."""
        return {name: rows for v in self.views for name, rows in v.rows(events).items()}

    def read(self, state: State, as_of_us: int) -> Values:
        """Scalar values of E entities in the order of `feature_names`. An entity without a `life` row is NOT_FOUND."""
        known = state["life"].counts > 0
        read = [v.read(state, as_of_us, known) for v in self.views]
        if len(read) == 1:
            return read[0]
        number, status = ([getattr(r, name) for r in read] for name in ("number", "status"))
        return Values(np.concatenate(number, axis=1), np.concatenate(status, axis=1))

    def times(self, state: State) -> Words:
        """Event time of the newest event behind each scalar value [E, F], 0 = none."""
        return np.concatenate([v.times(state) for v in self.views], axis=1)

    def declaration(self) -> str:
        """Text that changes when the meaning of stored state or of a value changes."""
        return repr([(v.name, v.version, v.tables, v.features, v.max_age_us) for v in self.views])


def version_of(*kinds: Views) -> str:
    """Version of a view set: 12 hex digits of the SHA-256 of the blobs' format and all declarations."""
    text = "\n".join([str(FORMAT), *(k.declaration() for k in kinds)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
