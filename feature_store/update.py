"""From events to the updates of one commit: load what the events touch, fold, pack. Used online and offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from feature_store.columns import EventColumns
from feature_store.commit import DELIVERY, EntryKind, Update
from feature_store.fold import fold
from feature_store.forget import clear, screen
from feature_store.state import State, decode, encode
from feature_store.view import Views
from feature_store.views import ITEM, USER
from recsys.core import EventBatch


class Load(Protocol):
    """OnlineStore.load."""

    def __call__(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities."""
        ...


def archived_updates(load: Load, batch: EventBatch) -> tuple[list[Update], list[Update]]:
    """Updates of features and of tombstones from events of a dataset: each once, late and stress ones left out."""
    table = batch.table
    late_or_stress = pc.or_(table.column("late"), table.column("stress"))
    events = EventColumns.of(EventBatch(table.filter(pc.invert(late_or_stress))))
    delivery = decode(DELIVERY, load("seen", events.user_ids))
    screened = screen(events, delivery["forgotten"])
    updates = folded(load, events.where(screened.keep), screened.cleared)
    if not screened.cleared.any():
        return updates, []
    delivery = State({**clear(delivery, screened.cleared).rows, "forgotten": screened.forgotten})
    return updates, [Update("seen", events.user_ids, encode(delivery))]


def folded(
    load: Load,
    events: EventColumns,
    cleared: npt.NDArray[np.bool_],
    *,
    of_items: npt.NDArray[np.bool_] | None = None,
    shadow: bool = False,
) -> list[Update]:
    """Updates of users and items by accepted events; cleared [users of `events`] are deleted first.

    of_items [N]: which events items do not have yet; None = all.
    """
    nobody = np.zeros(len(events.item_ids), np.bool_)
    for_items = events if of_items is None else events.where(of_items)
    return [_folded(load, USER, events, cleared, shadow), _folded(load, ITEM, for_items, nobody, shadow)]


def _folded(load: Load, views: Views, events: EventColumns, cleared: npt.NDArray[np.bool_], shadow: bool) -> Update:
    ids, code = (events.user_ids, events.user_code) if views.kind == "user" else (events.item_ids, events.item_code)
    touched = cleared.copy()
    touched[code[code >= 0]] = True
    at = np.flatnonzero(touched)
    ids = [ids[i] for i in at.tolist()]
    # Only what is touched is read and written: entities get new numbers, -1 stays -1.
    number = np.append(np.cumsum(touched) - 1, -1)[code]
    recoded = (
        replace(events, user_ids=ids, user_code=number)
        if views.kind == "user"
        else replace(events, item_ids=ids, item_code=number)
    )
    state = clear(decode(views.tables, load(views.kind, ids, shadow=shadow)), cleared[at])
    return Update(views.kind, ids, encode(fold(views, state, recoded)), shadow)
