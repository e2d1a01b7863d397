"""The LLM reranker: a distilled Qwen3-MoE that reorders candidates inside a deadline.

Light names only: the model, the engine and `transformers` are imported by a worker's main or by training.
"""

from llm_reranker.base import HistoryItem, Reranker, RerankRequest, RerankResult

__all__ = ["HistoryItem", "RerankRequest", "RerankResult", "Reranker"]
