"""Scores kept between requests: the same user's context, item, text and features give the same score."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from recsys.core import metrics

Scores = npt.NDArray[np.float32]


class ScoreCache:
    """Least recently used dropped first, bounded in entries; 0 = off. One engine, so one model version.

    A key is 128 bits of the context's token ids and all that a candidate's score depends on.
    """

    def __init__(self, items_max: int) -> None:
        self._items_max = items_max
        self._entries: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def keys(
        self, prefix: Sequence[int], item_ids: Sequence[str], texts: Sequence[str], features: Scores
    ) -> list[bytes]:
        """Key of each candidate; none where the cache is off. features: float32 [N, F]."""
        if not self._items_max:
            return []
        context = xxhash.xxh3_128_digest(np.asarray(prefix, np.int64).tobytes())
        found = []
        for item_id, text, row in zip(item_ids, texts, np.ascontiguousarray(features, np.float32), strict=True):
            name, said = (part.encode("utf-8", "surrogatepass") for part in (item_id, text))
            sizes = len(name).to_bytes(4, "little") + len(said).to_bytes(4, "little")
            found.append(xxhash.xxh3_128_digest(context + sizes + name + said + row.tobytes()))
        return found

    def get(self, keys: Sequence[bytes], n: int) -> Scores:
        """Score of each of n candidates, NaN where it is to be computed. keys: as `keys` gave them."""
        scores = np.full(n, np.nan, np.float32)
        for i, key in enumerate(keys):
            if (score := self._entries.get(key)) is not None:
                scores[i] = score
                self._entries.move_to_end(key)
        if keys:
            hits = int(np.isfinite(scores).sum())
            metrics.RERANK_SCORE_CACHE.labels("hit").inc(hits)
            metrics.RERANK_SCORE_CACHE.labels("miss").inc(n - hits)
        return scores

    def put(self, keys: Sequence[bytes], scores: Scores) -> None:
        """Keep finite scores."""
        for key, score in zip(keys, scores.tolist(), strict=True):
            if np.isfinite(score):
                self._entries[key] = score
        while len(self._entries) > self._items_max:
            self._entries.popitem(last=False)
