"""Small Qwen3 folders with random weights, as transformers saves them: dense and MoE, with a tokenizer that thinks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llm_reranker.checkpoint import train_tokenizer

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.3, "max_position_embeddings": 2048,
}  # fmt: skip
KINDS = {
    "dense": lambda n: Qwen3ForCausalLM(Qwen3Config(**COMMON, vocab_size=n, tie_word_embeddings=True)),
    "moe": lambda n: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, vocab_size=n, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20)
    ),
}


def write_folder(kind: str, out: Path, texts: list[str], **save: object) -> torch.nn.Module:
    """Save a model and its tokenizer to `out`, and return the model."""
    tokenizer = train_tokenizer(texts, 700)
    tokenizer.add_special_tokens(["<think>", "</think>"])
    torch.manual_seed(3)
    model = KINDS[kind](tokenizer.get_vocab_size()).eval()
    model.save_pretrained(out, **save)
    tokenizer.save(str(out / "tokenizer.json"))
    return model
