"""[heavy] The forward on CUDA: layers of Qwen3-30B-A3B's shape with random weights in bfloat16, where a GPU is at hand.

Candidates per second against transformers' grouped_mm, and model FLOP utilisation: the multiply-adds of the active
parameters over the device's speed in one large product measured beside it. Ours is asked as the engine asks it, with
recorded forwards (llm_reranker.graphs) and without.
Shape legend: N candidates, P prefix tokens, S tokens of a candidate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from scipy.stats import kendalltau
from torch import Tensor

from llm_reranker.graphs import Graphs, Recorder, cuda_graph
from llm_reranker.model import ModelConfig
from recsys.bench.harness import Row, figure, sampled
from recsys.bench.rerank_peers import NO, YES, Contestant, Ours, Transformers, random_model, tensors
from recsys.core.logging import get_logger

# Source: config.json of https://huggingface.co/Qwen/Qwen3-30B-A3B; two of its 48 layers.
LAYER = {
    "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
_log = get_logger(__name__)
CUDA = torch.device("cuda")
_GEMM = 8192


class Recorded(Ours):
    """double11's forward, played back; kernel by kernel where it cannot be recorded, as the engine does."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], record: Recorder) -> None:
        super().__init__(config, tensors, "bf16")
        self.name = "double11 bf16, recorded"
        self._graphs: Graphs | None = Graphs(self._model, graphs_max=4, record=record)

    def cold(self, prefix_P: Tensor, suffix_NS: Tensor) -> Tensor:
        """See Contestant."""
        if self._graphs is None:
            return super().cold(prefix_P, suffix_NS)
        try:
            self._kept = [self._graphs.prefix(prefix_P.tolist())]
            return self.warm(suffix_NS)
        except RuntimeError as error:
            _log.warning("cuda_graphs_off", reason=str(error))
            self.name, self._graphs = "double11 bf16, not recorded", None
            return super().cold(prefix_P, suffix_NS)

    def warm(self, suffix_NS: Tensor) -> Tensor:
        """See Contestant."""
        if self._graphs is None:
            return super().warm(suffix_NS)
        n, s = suffix_NS.shape
        hidden_ND = self._graphs.states(self._kept[0], self._model.embed(suffix_NS.flatten()), [s] * n)
        return hidden_ND.float() @ self._model.label_direction(YES, NO)


def on_device(
    size: dict[str, int], *, candidates: int, prefix: int, suffix: int, repeats: int, gemm: int = _GEMM,
    device: torch.device = CUDA, record: Recorder = cuda_graph, wait: Callable[[], None] = torch.cuda.synchronize,
) -> list[Row]:  # fmt: skip
    """Rows of cold and warm prefix. gemm: size of the large product. wait: until the device has done its work."""
    model = random_model(size)
    config = ModelConfig.from_json(model.config.to_dict(), "bench")
    weights = {name: tensor.to(device, torch.bfloat16) for name, tensor in tensors(model, config).items()}
    model = model.to(device, torch.bfloat16)
    prefix_P = torch.randint(0, config.vocab_size, (prefix,), device=device)
    suffix_NS = torch.randint(0, config.vocab_size, (candidates, suffix), device=device)
    field: dict[str, Contestant] = {
        "ours": Recorded(config, weights, record),
        "eager": Ours(config, weights, "bf16"),
        "peer": Transformers(model, "shared", "grouped_mm"),
    }
    ours, eager, peer = (c.cold(prefix_P, suffix_NS).float().cpu() for c in field.values())
    rows = [figure("CUDA, order against transformers", "tau", float(kendalltau(ours, peer).statistic))]
    rows += [figure("CUDA, order against kernel by kernel", "tau", float(kendalltau(ours, eager).statistic))]
    speed = _gemm_flops_per_s(device, wait, gemm)
    for state in ("cold", "warm"):
        took: dict[str, list[float]] = {name: [] for name in field}
        for round_ in range(repeats + 1):
            for name, c in field.items():
                wait()
                started_s = time.perf_counter()
                _ = c.cold(prefix_P, suffix_NS) if state == "cold" else c.warm(suffix_NS)
                wait()
                if round_:
                    took[name].append(candidates / (time.perf_counter() - started_s))
        tokens = candidates * suffix + (prefix if state == "cold" else 0)
        limit = candidates * speed / (2 * config.active_parameters() * tokens)
        what = f"CUDA, {candidates} candidates, {state} prefix"
        roles = {name: (c.name, took[name]) for name, c in field.items()}
        rows.append(sampled(what, "per_s", {**roles, "limit": ("active multiply-adds at GEMM speed", [limit])}))
        rows.append(figure(f"{what}, model FLOP utilisation", "share", median(took["ours"]) / limit))
    return rows


def _gemm_flops_per_s(device: torch.device, wait: Callable[[], None], size: int) -> float:
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(5):
        wait()
        started_s = time.perf_counter()
        _ = a @ a
        wait()
        best = max(best, 2 * size**3 / (time.perf_counter() - started_s))
    return best
