"""[heavy] Our Qwen3-MoE forward against transformers on the same weights: 50 candidates, one user.

Two peers: transformers with one shared prefix cache, the honest one, and transformers pointwise, every candidate with
its prefix again. All give the same log-odds, which is checked first. limit: the multiply-adds of the active parameters
at the speed of a large matrix product measured beside them.

Shape legend: N candidates, P prefix tokens, S tokens of a candidate, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llm_reranker.attention import PackedCausal, SharedPrefix
from llm_reranker.model import Model, ModelConfig
from recsys.bench.harness import Contest, Row, measure
from recsys.core import Internal

_YES, _NO, _TOLERANCE = 7, 11, 1e-3


def bench(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Milliseconds for all candidates, prefix included."""
    n, p, s = (6, 24, 4) if quick else (50, 256, 16)
    repeats = 2 if quick else 7
    size = {"hidden_size": 64, "num_hidden_layers": 2} if quick else {"hidden_size": 256, "num_hidden_layers": 4}
    torch.manual_seed(0)
    theirs: Any = Qwen3MoeForCausalLM(_config(size)).eval()
    config = ModelConfig.from_json(theirs.config.to_dict(), "bench")
    ours = Model(config, _tensors(theirs, config))
    prefix_P, suffix_NS = torch.randint(0, config.vocab_size, (p,)), torch.randint(0, config.vocab_size, (n, s))
    forwards: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: _ours(ours, prefix_P, suffix_NS),
        "cached": lambda: _cached(theirs, prefix_P, suffix_NS),
        "pointwise": lambda: _pointwise(theirs, prefix_P, suffix_NS),
    }
    with torch.inference_mode():
        scores = {name: forward() for name, forward in forwards.items()}
        for name in ("cached", "pointwise"):
            off = float((scores[name] - scores["ours"]).abs().max())
            if off > _TOLERANCE:
                raise Internal(f"scores of {name}", came=off, expected=f"within {_TOLERANCE} of ours", fix="Report it.")

        def work(name: str) -> Any:
            def run() -> float:
                forwards[name]()
                return 1.0

            return run

        one = ("double11", work("ours"))
        limit = ("active multiply-adds at GEMM speed", _gemm(2 * config.active_parameters() * (p + n * s)))
        contests = [
            Contest(what=f"rerank {n}, peer shares the prefix", unit="ms", ours=one, limit=limit,
                    peer=("transformers, shared prefix cache", work("cached"))),
            Contest(what=f"rerank {n}, peer pointwise", unit="ms", ours=one, limit=limit,
                    peer=("transformers, pointwise", work("pointwise"))),
        ]  # fmt: skip
        rows = measure(contests, repeats=repeats)
    shape = {"candidates": n, "prefix_tokens": p, "candidate_tokens": s, "threads": torch.get_num_threads()}
    return {**shape, **size, "active_parameters": config.active_parameters(), "repeats": repeats}, rows


def _config(size: dict[str, int]) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **size, vocab_size=4096, intermediate_size=2 * size["hidden_size"], moe_intermediate_size=size["hidden_size"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=True,
        max_position_embeddings=1024,
    )  # fmt: skip


def _tensors(theirs: Qwen3MoeForCausalLM, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Their weights by the names of a checkpoint file; in memory transformers has one tensor for a layer's experts."""
    tensors = {name: value.detach() for name, value in theirs.state_dict().items()}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}.mlp.experts."
        if f"{at}gate_up_proj" not in tensors:
            continue
        gate_up, down = tensors.pop(f"{at}gate_up_proj"), tensors.pop(f"{at}down_proj")
        for e in range(config.num_experts):
            gate, up = gate_up[e].chunk(2)
            tensors |= {
                f"{at}{e}.gate_proj.weight": gate,
                f"{at}{e}.up_proj.weight": up,
                f"{at}{e}.down_proj.weight": down[e],
            }
    return tensors


def _ours(model: Model, prefix_P: torch.Tensor, suffix_NS: torch.Tensor) -> torch.Tensor:
    (n, s), p = suffix_NS.shape, len(prefix_P)
    packed = PackedCausal([p], states=False)
    model.hidden(model.embed(prefix_P), torch.arange(p), packed)
    position_T = torch.arange(p, p + s).repeat(n)
    last = SharedPrefix(packed.kept, [[s] * n], last_only=True)
    return model.hidden(model.embed(suffix_NS.flatten()), position_T, last) @ model.label_direction(_YES, _NO)


def _cached(model: Qwen3MoeForCausalLM, prefix_P: torch.Tensor, suffix_NS: torch.Tensor) -> torch.Tensor:
    n, p = len(suffix_NS), len(prefix_P)
    cache = DynamicCache(config=model.config)
    model.model(prefix_P[None], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(n)
    position_NS = torch.arange(p, p + suffix_NS.shape[1]).expand(n, -1)
    hidden = model.model(suffix_NS, past_key_values=cache, position_ids=position_NS).last_hidden_state[:, -1]
    return _odds(model, hidden)


def _pointwise(model: Qwen3MoeForCausalLM, prefix_P: torch.Tensor, suffix_NS: torch.Tensor) -> torch.Tensor:
    ids = torch.cat([prefix_P.expand(len(suffix_NS), -1), suffix_NS], dim=1)
    return _odds(model, model.model(ids, use_cache=False).last_hidden_state[:, -1])


def _odds(model: Qwen3MoeForCausalLM, hidden_ND: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = hidden_ND @ model.lm_head.weight[[_YES, _NO]].T
    return logits[:, 0] - logits[:, 1]


def _gemm(flops: int) -> Any:
    """Work that does about `flops` in square matrix products and says what share of them it did."""
    a = torch.randn(512, 512)
    times = max(1, round(flops / (2 * 512**3)))

    def run() -> float:
        for _ in range(times):
            a @ a
        return times * 2 * 512**3 / flops

    return run
