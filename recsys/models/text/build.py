"""Which encoder a configuration means, and which one a run has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recsys.core import RunDirectory
from recsys.models.config import TowerConfig
from recsys.models.text import lsa, sentence
from recsys.models.text.base import TextEncoder

FOLDER = "models/text"  # of a run: what later titles are encoded with


def encoder_for(config: TowerConfig, texts: Sequence[str], device: str = "cpu") -> TextEncoder | None:
    """The encoder of a new run, fitted on the texts of its catalogue where it has to be; None for none.

    Raises: NotFound, VersionMismatch, CorruptData for a folder.
    """
    if not config.text_encoder or not any(texts):
        return None
    if config.text_encoder == lsa.NAME:
        return lsa.Lsa.fit(texts, config.text_dim)
    return sentence.SentenceEncoder(Path(config.text_encoder), device)


def versions_of(config: TowerConfig) -> dict[str, str]:
    """What of the encoder is decided outside the configuration: the files of a folder. For a run's manifest."""
    outside = config.text_encoder not in ("", lsa.NAME)
    return {"text_encoder": sentence.version(Path(config.text_encoder))} if outside else {}


def encoder_of(run: RunDirectory) -> TextEncoder | None:
    """The encoder a run was trained with; None for a run without. Raises: as what reads it."""
    if run.has(f"{FOLDER}/{lsa.NAME}.safetensors"):
        return lsa.Lsa.load(run)
    if run.has(f"{FOLDER}/{sentence.MODULES}"):
        return sentence.SentenceEncoder(run.root / FOLDER)
    return None
