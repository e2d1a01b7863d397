"""Query: one question to the recommender, as the pipeline sees it."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.core.attributes import EVERYTHING, Where
from recsys.core.ids import key


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What a storefront asks, checked and with defaults filled in.

    as_of_us: features are read, and candidates are available, strictly before this time (microseconds UTC).
    limit: items wanted. exclude: item ids that must not appear. new_only: drop what the user has touched.
    where: what a slate may hold.
    priority: 0 (shed first) to 9 (shed last). stress: marked synthetic traffic, writes go to shadow keys.
    """

    user_id: str
    as_of_us: int
    limit: int = 10
    request_id: str = ""
    session_id: str = ""
    surface: str = ""
    query_text: str = ""
    current_item: str = ""
    cart: tuple[str, ...] = ()
    exclude: frozenset[str] = frozenset()
    priority: int = 5
    stress: bool = False
    new_only: bool = False
    where: Where = EVERYTHING

    @property
    def user_key(self) -> int:
        """int64 key of the user id."""
        return key(self.user_id)
