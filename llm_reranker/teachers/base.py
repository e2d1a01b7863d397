"""What every teacher promises: soft labels for candidate lists, and what they cost. Shape legend: n rows of a list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_reranker.lists import Lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a teacher says of one list. log_odds: of "yes", float32 [n]; NaN where its answer was of no use.

    prompt: what it was asked, of several permutations the first; empty for networks that read the lists themselves.
    lost: nothing could be read, but it might be another time: nothing to be kept.
    """

    log_odds: npt.NDArray[np.float32]
    prompt: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    lost: bool = False


class Teacher(Protocol):
    """Judges candidates. Made from data before the validation block, or from none of ours."""

    @property
    def name(self) -> str:
        """Who labels: the same name means the same label for the same texts."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the report says about it: name, active parameters (0 = unknown), loss."""
        ...

    @property
    def fitted(self) -> bool:
        """True when it was trained on these lists, whose ranker scores it reads.

        What another one says is put beside the ranker's scores before anybody learns from it.
        """
        ...

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[int, Judgement]]:
        """(place in `queries`, judgement of its rows), each place once, in the order in which they are ready.

        Raises: Unavailable when its service does not answer, Overloaded when its budget is spent; what was given
        until then counts.
        """
        ...
