"""Text vectors of a catalogue for training the towers: rank 0 makes them, or has them kept, and tells the others.

So every rank reads the same bits, whatever its host computes, and no encoder is loaded or fitted twice.

Shape legend: M items, T width of a text vector.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from recsys.core.items import ItemTable
from recsys.models.config import TowerConfig
from recsys.models.text.base import TextEncoder, title_text
from recsys.models.text.build import encoder_for
from recsys.models.text.cache import kept_vectors
from recsys.training.ranks import Ranks

_ROWS = 65_536  # told at once
Half = npt.NDArray[np.float16]


def item_text(
    items: ItemTable, config: TowerConfig, work: Path, ranks: Ranks
) -> tuple[TextEncoder | None, Half | None]:
    """The encoder (on rank 0) and the vectors [M, T] of the titles (on all); None where there are none.

    Raises: NotFound, VersionMismatch, CorruptData for an encoder's folder, or for vectors kept in a file.
    """
    encoder, made = None, np.empty((len(items), 0), np.float16)
    if ranks.leads:
        texts = [title_text(title) for title in items.column("title")]
        encoder = encoder_for(config, texts, ranks.device.type)
        if encoder is not None:
            made = kept_vectors(encoder, texts, Path(config.text_cache_path or work / "text"))
            made += np.float16(0)  # a sum over ranks knows no -0, and checkpoints compare bits
    if ranks.size == 1:
        return encoder, made if made.shape[1] else None
    width = int(ranks.sum(torch.tensor([made.shape[1]], device=ranks.device)))
    text = np.empty((len(items), width), np.float16)
    for start in range(0, len(items) if width else 0, _ROWS):
        part = slice(start, start + _ROWS)
        told = torch.zeros(len(text[part]), width, device=ranks.device)
        if ranks.leads:
            told.copy_(torch.from_numpy(made[part]))
        text[part] = ranks.sum(told).cpu().numpy()
    return encoder, text if width else None
