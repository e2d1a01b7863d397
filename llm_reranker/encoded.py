"""Lists as tensors: one tokenizer, one place where candidates are chosen for a batch. Heavy: torch.

Shape legend: B lists, P prefix tokens, N candidates, L item tokens, C collaborative embedding width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_reranker.lists import Lists
from llm_reranker.prompt import Prompt
from recsys.core.ids import find_rows

Rows = npt.NDArray[np.int64]
_BELOW = 4  # one negative from below the depth for so many candidates


@dataclass(frozen=True, slots=True)
class Batch:
    """B lists padded to the longest prefix, the most candidates and the longest item text."""

    prefix_BP: Tensor  # token ids
    prefix_length_B: Tensor
    text_BNL: Tensor  # token ids
    text_real_BNL: Tensor
    embedding_BNC: Tensor
    features_BNF: Tensor
    label_BN: Tensor
    real_BN: Tensor


class Encoded:
    """Lists with their texts tokenised once."""

    def __init__(
        self, lists: Lists, prompt: Prompt, embedding_RC: npt.NDArray[np.float32], *, text: bool = True
    ) -> None:
        """embedding_RC: the rows' collaborative embeddings in one common space, NaN rows where unknown.

        text: False hides every history and item text, for the ablation that asks what they are worth.
        """
        self.lists, self.prompt, self._embedding_RC, self._text = lists, prompt, embedding_RC, text
        tokens: dict[str, tuple[int, ...]] = {}
        texts = lists.item_text if text else [""] * len(lists.item_text)
        self._items = [tokens.get(t) or tokens.setdefault(t, prompt.item(t)) for t in texts]

    def prefix(self, query: int) -> tuple[int, ...]:
        """Token ids of a query's prefix."""
        return self.prompt.prefix(self.lists.history_text[query] if self._text else "")

    def training_rows(self, query: int, depth: int) -> Rows:
        """The best `depth` rows by rank, and a quarter as many negatives spread over what is below them.

        All of the best, not a sample by label: where positives are kept and negatives thinned out, a network learns
        that low ranks are good.
        """
        rows = self.lists.rows(query)
        below = rows[depth:][self.lists.label[rows[depth:]] == 0]
        spread = np.linspace(0, len(below) - 1, min(len(below), depth // _BELOW)).astype(np.int64)
        return np.concatenate([rows[:depth], below[spread]])

    def batch(self, queries: Sequence[int], rows: Sequence[Rows], features: Sequence[npt.NDArray[np.float32]]) -> Batch:
        """Tensors of some queries and chosen rows of each; features float32 [n, F] of those rows."""
        prefixes = [self.prefix(q) for q in queries]
        n = max(map(len, rows))
        width = max(len(self._items[r]) for part in rows for r in part) or 1
        text = np.zeros((len(rows), n, width), np.int64)
        text_real = np.zeros((len(rows), n, width), bool)
        embedding = np.full((len(rows), n, self._embedding_RC.shape[1]), np.nan, np.float32)
        label = np.zeros((len(rows), n), np.float32)
        values = np.zeros((len(rows), n, features[0].shape[1]), np.float32)
        for b, part in enumerate(rows):
            for i, r in enumerate(part):
                ids = self._items[r]
                text[b, i, : len(ids)], text_real[b, i, : len(ids)] = ids, True
            embedding[b, : len(part)] = self._embedding_RC[part]
            label[b, : len(part)] = self.lists.label[part]
            values[b, : len(part)] = features[b]
        lengths = torch.tensor([len(p) for p in prefixes])
        longest = int(lengths.max())
        return Batch(
            prefix_BP=torch.tensor([[*p, *[0] * (longest - len(p))] for p in prefixes]),
            prefix_length_B=lengths,
            text_BNL=torch.from_numpy(text),
            text_real_BNL=torch.from_numpy(text_real),
            embedding_BNC=torch.from_numpy(embedding),
            features_BNF=torch.from_numpy(values),
            label_BN=torch.from_numpy(label),
            real_BN=torch.arange(n) < torch.tensor([len(part) for part in rows])[:, None],
        )


def align(
    embedding_RC: npt.NDArray[np.float32],
    block_R: Rows,
    item_key_R: Rows,
    reference: tuple[Rows, npt.NDArray[np.float32]],
) -> npt.NDArray[np.float32]:
    """Rotate each block's embeddings into the space of the reference, which serving will use.

    Towers of different windows are trained apart, so their axes mean different things; a rotation keeps every dot
    product of a block as it was. block_R: which block (window) a row is of. reference: item_key [M], vectors [M, C].
    Source: orthogonal Procrustes (Schönemann 1966), as for embeddings over time in Hamilton et al., ACL 2016.
    """
    keys, vectors = reference
    order = np.argsort(keys, kind="stable")
    at = find_rows(keys[order], item_key_R, order)
    shared = (at >= 0) & ~np.isnan(embedding_RC).any(axis=1)
    aligned = embedding_RC.copy()
    for block in np.unique(block_R):
        rows = np.flatnonzero(block_R == block)
        _, first = np.unique(item_key_R[rows], return_index=True)
        common = rows[first][shared[rows[first]]]
        if len(common):
            u, _, vt = np.linalg.svd(embedding_RC[common].T.astype(np.float64) @ vectors[at[common]])
            aligned[rows] = embedding_RC[rows] @ (u @ vt).astype(np.float32)
    return aligned
