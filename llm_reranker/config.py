"""Sections [llm_reranker] and [llm_reranker.distill] of double11.toml."""

from __future__ import annotations

from dataclasses import dataclass

from recsys.core.config import in_range, section


@section("llm_reranker")
@dataclass(frozen=True, kw_only=True, slots=True)
class RerankConfig:
    """Bounds of serving. ms_per_token_start: assumed speed until the first batches are measured.

    prefix_tokens_max and item_tokens_max are for folders without double11.json; ours carry their own.
    """

    candidates_max: int = 1000
    prefix_tokens_max: int = 512
    item_tokens_max: int = 48
    batch_tokens_max: int = 8192
    queue_requests_max: int = 256
    prefix_cache_bytes_max: int = 256 << 20
    ms_per_token_start: float = 0.05
    threads: int = 2

    def __post_init__(self) -> None:
        in_range("llm_reranker.candidates_max", self.candidates_max, 1, 1000)
        in_range("llm_reranker.prefix_tokens_max", self.prefix_tokens_max, 32, 32_768)
        in_range("llm_reranker.item_tokens_max", self.item_tokens_max, 1, 1024)
        in_range("llm_reranker.batch_tokens_max", self.batch_tokens_max, 64, 1 << 20)
        in_range("llm_reranker.queue_requests_max", self.queue_requests_max, 1, 65_536)
        in_range("llm_reranker.prefix_cache_bytes_max", self.prefix_cache_bytes_max, 0, 1 << 40)
        in_range("llm_reranker.ms_per_token_start", self.ms_per_token_start, 1e-5, 1e3)
        in_range("llm_reranker.threads", self.threads, 1, 256)
