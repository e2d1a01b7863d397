"""From events to the updates of one commit: load what the events touch, fold, pack. Used online and offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from feature_store.columns import EventColumns, NewRows
from feature_store.commit import DELIVERY, EntryKind, Update
from feature_store.fold import fold, merge
from feature_store.forget import clear, screen
from feature_store.state import Rows, State, Words, decode, encode
from feature_store.view import Views
from feature_store.views import ITEM, USER
from recsys.core import EventBatch


class Load(Protocol):
    """OnlineStore.load."""

    def __call__(self, kind: EntryKind, ids: Sequence[str], *, shadow: bool = False) -> list[bytes]:
        """Packed state of entities."""
        ...


def archived_updates(
    load: Load, batch: EventBatch, *, slate: Words | None = None, horizon_us: int | None = None
) -> tuple[list[Update], list[Update]]:
    """Updates of features, of tombstones and of seen ids from events of a dataset; late and stress ones left out.

    Each event comes once. horizon_us: how long ids are kept behind a user's latest event, None = no ids at all. slate
    [N]: number of the slate that an event is part of, -1 for others; the events of one slate come together.
    """
    table = batch.table
    taken = pc.invert(pc.or_(table.column("late"), table.column("stress"))).to_numpy()
    events = EventColumns.of(batch if taken.all() else batch.filter(taken))
    of_slate = np.full(len(events), -1, np.int64) if slate is None else slate[taken]
    delivery = decode(DELIVERY, load("seen", events.user_ids))
    screened = screen(events, delivery["forgotten"])
    updates = folded(load, events.where(screened.keep), screened.cleared)
    delivery = State({**clear(delivery, screened.cleared).rows, "forgotten": screened.forgotten})
    if horizon_us is None:
        return updates, [Update("seen", events.user_ids, encode(delivery))] if screened.cleared.any() else []
    acted = np.flatnonzero(screened.keep & (events.user_code >= 0) & (of_slate < 0))
    ids = [_seen_ids(events, acted, "seen", delivery, horizon_us)]
    shown = np.flatnonzero(screened.keep & (of_slate >= 0))
    if len(shown):
        # A slate is one unit, under the key of its first event: as the job keeps it.
        first = shown[np.unique(of_slate[shown], return_index=True)[1]]
        known = clear(decode(DELIVERY, load("shown", events.user_ids)), screened.cleared)
        ids.append(_seen_ids(events, first, "shown", known, horizon_us))
    return updates, ids


def tombstone_updates(load: Load, users: Sequence[str], until_us: Words) -> list[Update]:
    """Tombstones of users who have been forgotten up to a time [len(users)]; what is kept of them stays."""
    delivery = decode(DELIVERY, load("seen", users))
    new = NewRows.of(np.arange(len(users)), until_us)
    forgotten = merge(delivery["forgotten"], new)
    return [Update("seen", users, encode(State({**delivery.rows, "forgotten": forgotten})))]


def kept_ids(seen: Rows, horizon_us: int) -> Rows:
    """The ids no older than the horizon behind their user's latest event."""
    latest = np.maximum.reduceat(np.append(seen["time_us"], -1), np.minimum(seen.offsets[:-1], len(seen.words)))
    return seen.where(seen["time_us"] >= latest[seen.owner] - horizon_us)


def _seen_ids(events: EventColumns, at: Words, kind: EntryKind, delivery: State, horizon_us: int) -> Update:
    new = NewRows.of(events.user_code[at], events.time_us[at], events.event_key[at])
    seen = kept_ids(merge(delivery["seen"], new), horizon_us)
    return Update(kind, events.user_ids, encode(State({**delivery.rows, "seen": seen})))


def folded(load: Load, events: EventColumns, cleared: npt.NDArray[np.bool_], *, shadow: bool = False) -> list[Update]:
    """Updates of users and items by accepted events; cleared [users of `events`] are deleted first."""
    return [users_folded(load, events, cleared, shadow=shadow), items_folded(load, events, shadow=shadow)]


def users_folded(load: Load, events: EventColumns, cleared: npt.NDArray[np.bool_], *, shadow: bool = False) -> Update:
    """Update of users by accepted events; cleared [users of `events`] are deleted first."""
    return _folded(load, USER, events, cleared, shadow)


def items_folded(load: Load, events: EventColumns, *, shadow: bool = False) -> Update:
    """Update of items by accepted events."""
    return _folded(load, ITEM, events, np.zeros(len(events.item_ids), np.bool_), shadow)


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
