"""[heavy] The forward on CUDA: layers of Qwen3-30B-A3B's shape with random weights in bfloat16, where a GPU is at hand.

Candidates per second against transformers' grouped_mm, and model FLOP utilisation: the multiply-adds of the active
parameters over the device's speed in one large product measured beside it.
Shape legend: N candidates, P prefix tokens, S tokens of a candidate.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from scipy.stats import kendalltau

from llm_reranker.model import ModelConfig
from recsys.bench.harness import Row, figure, sampled
from recsys.bench.rerank_peers import Contestant, Ours, Transformers, random_model, tensors

# Source: config.json of https://huggingface.co/Qwen/Qwen3-30B-A3B; two of its 48 layers.
LAYER = {
    "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
_GEMM = 8192


def on_cuda(size: dict[str, int], *, candidates: int, prefix: int, suffix: int, repeats: int) -> list[Row]:
    """Rows of cold and warm prefix. Needs a CUDA device."""
    model = random_model(size).to("cuda", torch.bfloat16)
    config = ModelConfig.from_json(model.config.to_dict(), "bench")
    device = torch.device("cuda")
    prefix_P = torch.randint(0, config.vocab_size, (prefix,), device=device)
    suffix_NS = torch.randint(0, config.vocab_size, (candidates, suffix), device=device)
    field: dict[str, Contestant] = {
        "ours": Ours(config, tensors(model, config), "bf16"),
        "peer": Transformers(model, "shared", "grouped_mm"),
    }
    scores = [c.cold(prefix_P, suffix_NS).float().cpu() for c in field.values()]
    rows = [figure("CUDA, order against transformers", "tau", float(kendalltau(*scores).statistic))]
    speed = _gemm_flops_per_s(device)
    for state in ("cold", "warm"):
        took: dict[str, list[float]] = {name: [] for name in field}
        for round_ in range(repeats + 1):
            for name, c in field.items():
                torch.cuda.synchronize()
                started_s = time.perf_counter()
                _ = c.cold(prefix_P, suffix_NS) if state == "cold" else c.warm(suffix_NS)
                torch.cuda.synchronize()
                if round_:
                    took[name].append(candidates / (time.perf_counter() - started_s))
        tokens = candidates * suffix + (prefix if state == "cold" else 0)
        limit = candidates * speed / (2 * config.active_parameters() * tokens)
        what = f"CUDA, {candidates} candidates, {state} prefix"
        roles = {name: (c.name, took[name]) for name, c in field.items()}
        rows.append(sampled(what, "per_s", {**roles, "limit": ("active multiply-adds at GEMM speed", [limit])}))
        rows.append(figure(f"{what}, model FLOP utilisation", "share", median(took["ours"]) / limit))
    return rows


def _gemm_flops_per_s(device: torch.device) -> float:
    a = torch.randn(_GEMM, _GEMM, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        _ = a @ a
        torch.cuda.synchronize()
        best = max(best, 2 * _GEMM**3 / (time.perf_counter() - started_s))
    return best
