"""What every teacher promises: soft labels for candidate lists, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_reranker.lists import Lists


class Teacher(Protocol):
    """Judges candidates. Made from data before the validation block, or from none of ours."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the report says about it: name, active parameters (0 = unknown), loss."""
        ...

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> list[npt.NDArray[np.float32]]:
        """Log-odds of "yes" for the given rows of each query, one float32 [n] per query.

        Raises: Unavailable when its service does not answer.
        """
        ...
