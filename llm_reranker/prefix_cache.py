"""Keys and values of users' contexts, kept between requests. Heavy: torch."""

from __future__ import annotations

from collections import OrderedDict

from llm_reranker.attention import KeyValues
from recsys.core import metrics


class PrefixCache:
    """Least recently used dropped first, bounded in bytes. One engine, so one model version; keyed by the token ids."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._entries: OrderedDict[tuple[int, ...], tuple[KeyValues, int]] = OrderedDict()
        self.used_bytes = 0

    def __contains__(self, ids: tuple[int, ...]) -> bool:
        return ids in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, ids: tuple[int, ...]) -> KeyValues | None:
        """The prefix's keys and values, if kept."""
        found = self._entries.get(ids)
        metrics.RERANK_PREFIX_CACHE.labels("hit" if found else "miss").inc()
        if found is None:
            return None
        self._entries.move_to_end(ids)
        return found[0]

    def put(self, ids: tuple[int, ...], kv: KeyValues) -> None:
        """Keep a prefix, if it fits at all."""
        size = sum(t.nbytes for pair in kv for t in pair)
        if size > self._bytes_max or ids in self._entries:
            return
        self._entries[ids] = (kv, size)
        self.used_bytes += size
        while self.used_bytes > self._bytes_max:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.used_bytes -= dropped
