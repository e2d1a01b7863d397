"""Vectors of texts kept in a file per encoder, so that an item's title is encoded once, whatever is trained how often.

    FOLDER/ENCODER-VERSION.safetensors    keys of texts (ascending) and their vectors in half precision

A text's key is its content's, so an item that is renamed is encoded again and two of one name once. Of texts that the
catalogue at hand does not have, at most as many are kept as it has itself.

Shape legend: N texts, K texts kept, T width of a text vector.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from recsys.core import CorruptData, disk, metrics
from recsys.core.ids import find_rows, keys
from recsys.core.progress import bar
from recsys.models.text.base import TextEncoder

_BATCH_TEXTS = 1_024
Keys = npt.NDArray[np.int64]
Half = npt.NDArray[np.float16]


def kept_vectors(encoder: TextEncoder, texts: Sequence[str], folder: Path) -> Half:
    """Vectors [N, T] of texts, zeros for empty ones; those that were never encoded are, and are kept in `folder`.

    Raises: CorruptData for a file that is damaged.
    """
    path = folder / f"{encoder.version}.safetensors"
    text_key = keys(texts)
    said = np.array([bool(text) for text in texts], np.bool_)
    wanted, first = np.unique(text_key[said], return_index=True)
    place = np.flatnonzero(said)[first]
    held_key, held = _read(path, encoder.dim) if encoder.keeps else _nothing(encoder.dim)
    fresh = np.flatnonzero(find_rows(held_key, wanted) < 0)
    made = _encoded(encoder, [texts[i] for i in place[fresh]])
    metrics.TEXTS_ENCODED.labels("encoded").inc(len(fresh))
    metrics.TEXTS_ENCODED.labels("kept").inc(len(wanted) - len(fresh))
    if len(fresh):
        other = np.flatnonzero(find_rows(wanted, held_key) < 0)[len(wanted) :]
        held_key, held = np.delete(held_key, other), np.delete(held, other, axis=0)
        held_key, held = np.append(held_key, wanted[fresh]), np.concatenate([held, made])
        order = np.argsort(held_key)
        held_key, held = held_key[order], held[order]
        if encoder.keeps:
            _write(path, held_key, held)
    vectors = np.zeros((len(texts), encoder.dim), np.float16)
    vectors[said] = held[find_rows(held_key, text_key[said])]
    return vectors


def _encoded(encoder: TextEncoder, texts: list[str]) -> Half:
    made = [np.empty((0, encoder.dim), np.float16)]
    with bar(total=len(texts), what="titles", unit="title") as progress:
        for start in range(0, len(texts), _BATCH_TEXTS):
            made.append(encoder.encode(texts[start : start + _BATCH_TEXTS]).astype(np.float16))
            progress.update(len(made[-1]))
    return np.concatenate(made)


def _nothing(dim: int) -> tuple[Keys, Half]:
    return np.empty(0, np.int64), np.empty((0, dim), np.float16)


def _read(path: Path, dim: int) -> tuple[Keys, Half]:
    if not path.is_file():
        return _nothing(dim)
    try:
        stored = load_file(path)
        text_key, vectors = stored["text_key"], stored["vectors"]
    except (SafetensorError, KeyError, OSError) as error:
        came = f"{error!r:.200}"
    else:
        if vectors.shape == (len(text_key), dim) and np.isfinite(vectors).all():
            return text_key, vectors
        came = f"vectors {vectors.shape} of {len(text_key)} texts, or not all of them numbers"
    raise CorruptData(
        f"kept text vectors {path}", came=came, expected=f"finite vectors of width {dim}", fix="Delete the file."
    )


def _write(path: Path, text_key: Keys, vectors: Half) -> None:
    """Whole or not at all; of two writers the later one stays, and what only the other had is encoded again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    with disk.writing(name):
        save_file({"text_key": text_key, "vectors": vectors}, name)
    Path(name).replace(path)
