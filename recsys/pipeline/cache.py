"""The cached tier: every user's last good slate, bounded, oldest forgotten first."""

from __future__ import annotations

from collections import OrderedDict

from recsys.core import Candidates, Query


class LastSlates:
    """Least-recently-used map from user (and whether only new items were wanted) to the candidates of a slate."""

    def __init__(self, users_max: int) -> None:
        """users_max: 0 keeps nothing."""
        self._users_max = users_max
        self._slates: OrderedDict[tuple[str, bool], Candidates] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slates)

    def put(self, query: Query, shown: Candidates) -> None:
        """Remember a slate; stress traffic leaves no trace."""
        if query.stress or not self._users_max or not len(shown):
            return
        key = (query.user_id, query.new_only)
        self._slates[key] = shown
        self._slates.move_to_end(key)
        if len(self._slates) > self._users_max:
            self._slates.popitem(last=False)

    def get(self, query: Query) -> Candidates | None:
        """The user's last slate in its order, to be filtered again."""
        key = (query.user_id, query.new_only)
        if key not in self._slates:
            return None
        self._slates.move_to_end(key)
        return self._slates[key]
