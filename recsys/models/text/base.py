"""TextEncoder: texts to vectors. Which one a configuration means, and which one a run has.

Shape legend: N texts, T width of a text vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llm_reranker.prompt import clip

Vectors = npt.NDArray[np.float32]


class TextEncoder(Protocol):
    """Texts to vectors of length 1; zeros for a text of which it can make nothing.

    version: changes with whatever changes a vector. keeps: whether vectors are worth keeping between trainings.
    """

    version: str
    keeps: bool

    @property
    def dim(self) -> int:
        """T."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors [N, T]."""
        ...

    def save(self, folder: Path) -> None:
        """Write what it needs into `folder`, which is made."""
        ...


def title_text(title: str | None) -> str:
    """What of a title is encoded: one line of at most 4,096 bytes; empty where there is none."""
    return clip(title or "")


def encode_some(encoder: TextEncoder, texts: Sequence[str]) -> Vectors:
    """Vectors [N, T] of texts that may be empty: those are zeros and never reach the encoder."""
    said = [i for i, text in enumerate(texts) if text]
    vectors = np.zeros((len(texts), encoder.dim), np.float32)
    if said:
        vectors[said] = encoder.encode([texts[i] for i in said])
    return vectors
