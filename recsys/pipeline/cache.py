"""The cached tier: every user's last good slate, bounded, oldest forgotten first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from recsys.core import Candidates, Query


class _Kept(NamedTuple):
    since_s: float
    shown: Candidates
    of_a_past: bool


class LastSlates:
    """Map from user (and whether only new items were wanted) to the candidates of the last slate, oldest first."""

    def __init__(
        self, users_max: int, items_max: int, age_s_max: float, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """users_max: 0 keeps nothing. items_max: of all slates together. age_s_max: none is kept for longer."""
        self._users_max, self._items_max, self._age_s_max, self._now_s = users_max, items_max, age_s_max, now_s
        self._slates: OrderedDict[tuple[str, bool], _Kept] = OrderedDict()
        self._num_items = 0

    def __len__(self) -> int:
        return len(self._slates)

    def put(self, query: Query, shown: Candidates, *, of_a_past: bool = True) -> None:
        """Remember a slate; stress traffic leaves no trace. of_a_past: the store knew the user when it was made."""
        if query.stress or not self._users_max or not len(shown):
            return
        key = (query.user_id, query.new_only)
        self._drop(key)
        self._slates[key] = _Kept(self._now_s(), shown, of_a_past)
        self._num_items += len(shown)
        while len(self._slates) > self._users_max or self._num_items > self._items_max:
            self._drop(next(iter(self._slates)))
        self._drop_old()

    def get(self, query: Query) -> Candidates | None:
        """The user's last slate in its order, to be filtered again."""
        self._drop_old()
        kept = self._slates.get((query.user_id, query.new_only))
        return None if kept is None else kept.shown

    def forget(self, query: Query) -> None:
        """The store knows nothing of the user, maybe no more: what a past made is not to be shown any longer."""
        if not query.stress:
            for key in ((query.user_id, new_only) for new_only in (False, True)):
                if key in self._slates and self._slates[key].of_a_past:
                    self._drop(key)

    def _drop(self, key: tuple[str, bool]) -> None:
        if key in self._slates:
            self._num_items -= len(self._slates.pop(key).shown)

    def _drop_old(self) -> None:
        """Also slates that nobody asks for: a past is not kept beyond its time."""
        while self._slates:
            key, kept = next(iter(self._slates.items()))
            if self._now_s() - kept.since_s <= self._age_s_max:
                return
            self._drop(key)
