"""What every reranker promises, in one process or behind gRPC. Shape legend: N candidates, F features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from recsys.core import Deadline


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryItem:
    """One past action of the user. event_type: EventType number; time in microseconds UTC.

    text: `prompt.item_text` of the item; empty = looked up in the reranker's own item table.
    """

    item_id: str
    text: str
    event_type: int
    event_time_us: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankRequest:
    """A user's context and N candidates.

    history: oldest first. item_ids, texts: N each; an empty text is looked up in the reranker's own item table.
    features: float32 [N, F], columns in the order of the reranker's `feature_names`; NaN = missing.
    """

    request_id: str
    as_of_us: int
    history: Sequence[HistoryItem]
    item_ids: Sequence[str]
    texts: Sequence[str]
    features: npt.NDArray[np.float32]
    query_text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RerankResult:
    """scores: float32 [N], higher is better, NaN for candidates beyond `depth`. Times in milliseconds.

    cached_prefix_tokens: tokens of the user's context that did not have to be computed.
    """

    scores: npt.NDArray[np.float32]
    depth: int
    version: str
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    cached_prefix_tokens: int = 0


class Reranker(Protocol):
    """Scores candidates, each on its own: the order of candidates never changes a score."""

    @property
    def version(self) -> str:
        """Version folder of the model that answers."""
        ...

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Candidate features the model wants, e.g. ("rank_score", "rank_position", "own_history_rank")."""
        ...

    async def rerank(self, request: RerankRequest, deadline: Deadline) -> RerankResult:
        """Scores for the first `depth` candidates that fit the deadline (and one batch of the worker).

        Raises: BadInput, DeadlineExceeded (nothing fitted), Unavailable.
        """
        ...
