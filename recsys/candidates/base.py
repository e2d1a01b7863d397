"""What every candidate source promises."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from feature_store import UserFeatures
from recsys.core import Candidates, Deadline, Query


@runtime_checkable
class SearchesWhere(Protocol):
    """Mark of a source that looks for `query.where` itself, among more items than it could list.

    Any other source is asked for all it has when a query restricts its items, and its list is filtered.
    """

    searches_where: bool


class CandidateSource(Protocol):
    """Gives up to `limit` distinct items for a query, best first, with its own score.

    A source may come back with fewer, or none (a newcomer has no own history); that is a result, not an error.
    With `query.new_only` it leaves out what the user has touched, so that its places are not wasted.
    """

    @property
    def name(self) -> str:
        """The name in responses, reports and metrics, e.g. "own_history"."""
        ...

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """Candidates with one source bit called `name` and, first, a score column called `name`, never NaN.

        More score columns may follow, called `name_SOMETHING`: the ranker sees them, the order of the list does not.
        Raises: DeadlineExceeded, Unavailable. The pipeline counts those and goes on without this source.
        """
        ...
