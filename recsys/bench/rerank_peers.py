"""[heavy] Contestants of `bench rerank`: our engine, and transformers in each way it can share a prefix.

Every contestant scores the same N suffixes after the same prefix with the same weights, cold (the prefix is computed
too) or warm (it is there), reads two rows of the head, and keeps no other state between calls.

Shape legend: N candidates, P prefix tokens, S tokens of a candidate, G key/value heads, d head_dim, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llm_reranker.attention import KeyValues, PackedCausal, SharedPrefix, WithPrefixes
from llm_reranker.linear import Precision
from llm_reranker.model import Model, ModelConfig

YES, NO = 7, 11


class Contestant(Protocol):
    """One implementation at one setting."""

    name: str

    def cold(self, prefix_P: Tensor, suffix_NS: Tensor) -> Tensor:
        """Log-odds [N], prefix computed."""
        ...

    def warm(self, suffix_NS: Tensor) -> Tensor:
        """Log-odds [N] after the prefix of the last `cold`."""
        ...


class Ours:
    """double11's forward."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], precision: Precision) -> None:
        self.name = f"double11 {precision}"
        self._model = Model(config, tensors, precision)
        self._kept: list[KeyValues] = []
        self._prefix = 0

    def cold(self, prefix_P: Tensor, suffix_NS: Tensor) -> Tensor:
        """See Contestant."""
        (n, s), device = suffix_NS.shape, prefix_P.device
        self._prefix, packed = len(prefix_P), PackedCausal([len(prefix_P)], states=False)
        self._kept = packed.kept
        shared = SharedPrefix(self._kept, [[s] * n], last_only=True, device=device)
        at = torch.arange(self._prefix + s, device=device)
        hidden_ND = self._model.hidden(
            self._model.embed(torch.cat([prefix_P, suffix_NS.flatten()])),
            torch.cat([at[: self._prefix], at[self._prefix :].repeat(n)]),
            WithPrefixes(packed, self._prefix, shared),
        )
        return hidden_ND.float() @ self._model.label_direction(YES, NO)

    def warm(self, suffix_NS: Tensor) -> Tensor:
        """See Contestant."""
        n, s = suffix_NS.shape
        position_T = torch.arange(self._prefix, self._prefix + s, device=suffix_NS.device).repeat(n)
        last = SharedPrefix(self._kept, [[s] * n], last_only=True, device=suffix_NS.device)
        hidden_ND = self._model.hidden(self._model.embed(suffix_NS.flatten()), position_T, last)
        return hidden_ND.float() @ self._model.label_direction(YES, NO)


class Transformers:
    """transformers' Qwen3-MoE.

    way "shared": candidates are a batch over one cache, seen by all without a copy. way "packed": candidates are one
    sequence under a block mask. experts: its `experts_implementation`.
    """

    def __init__(self, model: Any, way: Literal["shared", "packed"], experts: str) -> None:
        self.name = f"transformers {experts}, {way}"
        self._model, self._way, self._experts = model, way, experts
        self._kept: list[tuple[Tensor, Tensor]] = []

    def cold(self, prefix_P: Tensor, suffix_NS: Tensor) -> Tensor:
        """See Contestant."""
        self._model.set_experts_implementation(self._experts)
        cache = DynamicCache(config=self._model.config)
        self._model.model(prefix_P[None], past_key_values=cache, use_cache=True)
        self._kept = [(layer.keys, layer.values) for layer in cache.layers]
        return self.warm(suffix_NS)

    def warm(self, suffix_NS: Tensor) -> Tensor:
        """See Contestant."""
        self._model.set_experts_implementation(self._experts)
        (n, s), p = suffix_NS.shape, self._kept[0][0].shape[2]
        device = suffix_NS.device
        if self._way == "shared":
            position_NS = torch.arange(p, p + s, device=device).expand(n, -1)
            hidden = self._model.model(suffix_NS, past_key_values=self._cache(n), position_ids=position_NS)
            return self._odds(hidden.last_hidden_state[:, -1])
        candidate_T = torch.arange(n, device=device).repeat_interleave(s)
        step_T = torch.arange(s, device=device).repeat(n)
        own_TT = (candidate_T[:, None] == candidate_T) & (step_T[:, None] >= step_T)
        sees = torch.cat([own_TT.new_ones(n * s, p), own_TT], 1)
        mask = torch.zeros(sees.shape, dtype=self._kept[0][0].dtype, device=device).masked_fill_(~sees, -torch.inf)
        hidden = self._model.model(
            suffix_NS.reshape(1, -1), past_key_values=self._cache(1), position_ids=(p + step_T)[None],
            attention_mask=mask[None, None],
        )  # fmt: skip
        return self._odds(hidden.last_hidden_state[0, s - 1 :: s])

    def _cache(self, n: int) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        for layer, (keys, values) in zip(cache.layers, self._kept, strict=True):
            layer.lazy_initialization(keys, values)
            # Not by `update`, which copies what is expanded: the first look at the cache is copy enough.
            layer.keys, layer.values = keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1)
        return cache

    def _odds(self, hidden_ND: Tensor) -> Tensor:
        logits: Tensor = hidden_ND @ self._model.lm_head.weight[[YES, NO]].T
        return logits[:, 0] - logits[:, 1]


def random_model(size: Mapping[str, int]) -> Any:
    """Transformers' model with random weights as large as trained ones are: a router that decides."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **size, vocab_size=512, intermediate_size=2 * size["hidden_size"], norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], tie_word_embeddings=True, max_position_embeddings=4096,
        initializer_range=size["hidden_size"] ** -0.5,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def tensors(theirs: Any, config: ModelConfig) -> dict[str, Tensor]:
    """Their weights by the names of a checkpoint file; in memory transformers has one tensor for a layer's experts."""
    found = {name: value.detach() for name, value in theirs.state_dict().items()}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}.mlp.experts."
        gate_up, down = found.pop(f"{at}gate_up_proj"), found.pop(f"{at}down_proj")
        for e in range(config.num_experts):
            gate, up = gate_up[e].chunk(2)
            found |= {
                f"{at}{e}.gate_proj.weight": gate,
                f"{at}{e}.up_proj.weight": up,
                f"{at}{e}.down_proj.weight": down[e],
            }
    return {name: found[name] for name in config.shapes()}
