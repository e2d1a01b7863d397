"""The encoder that needs no weights from elsewhere: latent semantic analysis of the catalogue's own titles.

tf-idf of words, cut to the directions in which titles differ most. Titles that share rare words are near each other,
so are titles whose words occur with the same others; a title of unknown words is zeros. Words are known by their keys.

Shape legend: N texts, W words, T directions.
Source: Deerwester et al. 1990 (LSA); Halko et al. 2011 (randomised SVD, `torch.svd_lowrank`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.core import RunDirectory
from recsys.core.ids import find_rows, keys
from recsys.models import storage
from recsys.models.text.words import words

NAME = "lsa"
TEXTS_MAX = 200_000  # so many of a catalogue are fitted on, evenly drawn
WORDS_MAX = 50_000  # the most frequent are kept
_MORE, _ROUNDS = 16, 4  # directions and iterations beyond what is kept: the start is random, the result is not


class Lsa:
    """Implements TextEncoder. Made by `fit`, or read from a run."""

    keeps = False  # another catalogue is another space, and a vector costs microseconds

    def __init__(self, word_key: npt.NDArray[np.int64], idf_W: Tensor, direction_WT: Tensor) -> None:
        """word_key: int64 [W], ascending."""
        self._word_key, self._idf_W, self._direction_WT = word_key, idf_W, direction_WT
        digest = hashlib.sha256(word_key.tobytes() + direction_WT.numpy().tobytes())
        self.version = f"{NAME}-{digest.hexdigest()[:12]}"

    @property
    def dim(self) -> int:
        """T."""
        return self._direction_WT.shape[1]

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int) -> Lsa | None:
        """On the texts of a catalogue, at most `dim` directions; None where no two texts share a word."""
        said = list(dict.fromkeys(t for t in texts if t))
        said = said[:: -(-len(said) // TEXTS_MAX) or 1]
        found = words(said)
        shared = (
            found.group_by("word").agg(texts=pl.len()).filter(pl.col("texts") > 1)
            .sort(["texts", "word"], descending=[True, False]).head(WORDS_MAX)
        )  # fmt: skip
        if len(shared) < 2:
            return None
        word_key, first = np.unique(keys(shared["word"]), return_index=True)
        idf = np.log1p(len(said) / shared["texts"].to_numpy()[first]).astype(np.float32)
        row, word, weight = _weighted(found, word_key, torch.from_numpy(idf))
        matrix_NW = torch.sparse_coo_tensor(
            torch.stack([row, word]), weight, (len(said), len(word_key)), check_invariants=True
        ).coalesce()
        width = min(dim, *matrix_NW.shape)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            _, _, v_WT = torch.svd_lowrank(matrix_NW, q=min(width + _MORE, *matrix_NW.shape), niter=_ROUNDS)
        return cls(word_key, torch.from_numpy(idf), v_WT[:, :width].contiguous())

    @classmethod
    def load(cls, run: RunDirectory) -> Lsa:
        """Of a run. Raises: CorruptData, VersionMismatch."""
        stored = storage.load(run, f"text/{NAME}").tensors
        with run.settings_of("text encoder"):
            return cls(stored["word_key"].numpy(), stored["idf"], stored["direction"])

    def save(self, folder: Path) -> None:
        """Write lsa.safetensors and lsa.json."""
        tensors = {"idf": self._idf_W, "direction": self._direction_WT, "word_key": torch.from_numpy(self._word_key)}
        storage.save(folder, NAME, {"dim": self.dim, "words": len(self._word_key)}, tensors)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors [N, T] of length 1, zeros where no word is known."""
        row, word, weight = _weighted(words(texts), self._word_key, self._idf_W)
        start = torch.searchsorted(row, torch.arange(len(texts)))
        summed_NT = F.embedding_bag(word, self._direction_WT, start, mode="sum", per_sample_weights=weight)
        vectors: npt.NDArray[np.float32] = F.normalize(summed_NT, dim=1).numpy()
        return vectors


def _weighted(found: pl.DataFrame, word_key: npt.NDArray[np.int64], idf_W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (ascending), words and tf-idf weights of the known words, each row of length 1."""
    distinct = found["word"].unique()
    key_of = pl.DataFrame({"word": distinct, "key": keys(distinct)})
    found = found.join(key_of, on="word", how="left", maintain_order="left")
    word = find_rows(word_key, found["key"].to_numpy())
    known = word >= 0
    row_V, word_V = torch.from_numpy(found["row"].to_numpy()[known].astype(np.int64)), torch.from_numpy(word[known])
    weight_V = idf_W[word_V]
    length_N = torch.zeros(int(row_V[-1]) + 1 if len(row_V) else 0).index_add(0, row_V, weight_V**2).sqrt()
    return row_V, word_V, weight_V / length_N[row_V]
