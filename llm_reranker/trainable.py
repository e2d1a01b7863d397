"""The reranker as it is trained: transformers' own Qwen3-MoE or dense Qwen3 plus our extras, lists as in serving.

A list is one sequence: the prefix, then every candidate's soft tokens and tail. The mask lets a candidate see the
prefix and itself only, so training computes what the serving engine computes. Heavy: torch, transformers.

Shape legend: B lists, P prefix tokens, N candidates, L item tokens, S tokens per candidate, T = P + N S, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llm_reranker.config import HEAD_DIM
from llm_reranker.encoded import Batch
from llm_reranker.extras import Extras

_HIDDEN_FROM = -1e9
INIT_STD = 0.05
LanguageModel: TypeAlias = Qwen3MoeForCausalLM | Qwen3ForCausalLM


class TrainableReranker(nn.Module):
    """forward gives raw log-odds [B, N] and the routers' logits (none of a dense network)."""

    def __init__(self, lm: LanguageModel, extras: Extras, yes: int, no: int, tail: Sequence[int]) -> None:
        super().__init__()
        self._sparse = isinstance(lm, Qwen3MoeForCausalLM)
        self.lm, self.extras, self._yes, self._no = lm, extras, yes, no
        self._tail = torch.tensor(list(tail))

    def embed(self, ids: Tensor) -> Tensor:
        """Input vectors of token ids."""
        vectors: Tensor = self.lm.get_input_embeddings()(ids)
        return vectors

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Raw log-odds [B, N]; router logits, one [B T, E] per layer; which of the B T tokens are real."""
        (b, p), (_, n, length) = batch.prefix_BP.shape, batch.text_BNL.shape
        text = self.embed(batch.text_BNL.view(b * n, length))
        soft = self.extras.encode(text, batch.text_real_BNL.view(b * n, length), batch.embedding_BNC.flatten(0, 1))
        prefix, real_BP = self.embed(batch.prefix_BP), torch.arange(p) < batch.prefix_length_B[:, None]
        signals = self.extras.signals(batch.features_BNF, soft.view(b, n, *soft.shape[1:]), prefix, real_BP)
        tail = self.embed(self._tail).expand(b * n, -1, -1)
        last = tail[:, -1:] + self.extras.signals_to_hidden(signals).view(b * n, 1, -1)
        suffix = torch.cat([soft, tail[:, :-1], last], 1)
        s = suffix.shape[1]
        x_BTD = torch.cat([prefix, suffix.view(b, n * s, -1)], 1)
        real_BT, position_BT, mask = _layout(batch, p, n, s)
        out = self.lm.model(
            inputs_embeds=x_BTD,
            attention_mask=mask,
            position_ids=position_BT,
            use_cache=False,
            **({"output_router_logits": True} if self._sparse else {}),
        )
        hidden_BND = out.last_hidden_state[:, p:].view(b, n, s, -1)[:, :, -1]
        head = self.lm.lm_head.weight
        delta = hidden_BND @ (head[self._yes] - head[self._no])
        router_logits = out.router_logits if self._sparse else ()
        return delta + self.extras.score(signals).view(b, n), router_logits, real_BT.flatten()


def _layout(batch: Batch, p: int, n: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real tokens [B, T], positions [B, T] and the additive mask [B, 1, T, T]."""
    b = len(batch.prefix_BP)
    step, candidate = torch.arange(n * s) % s, torch.arange(n * s) // s
    prefix_real = torch.arange(p) < batch.prefix_length_B[:, None]
    position = torch.cat([torch.arange(p).expand(b, p), batch.prefix_length_B[:, None] + step], 1)
    owner = torch.cat([torch.full((p,), -1), candidate])  # -1: the prefix, seen by all
    index = torch.arange(p + n * s)
    sees = (owner[None] == -1) | (owner[:, None] == owner[None])
    sees = sees & (index[None] <= index[:, None])
    key_real = torch.cat([prefix_real, torch.ones(b, n * s, dtype=torch.bool)], 1)
    mask = torch.where(sees[None] & key_real[:, None], 0.0, _HIDDEN_FROM)[:, None]
    return torch.cat([prefix_real, batch.real_BN.repeat_interleave(s, 1)], 1), position, mask


def build(
    tokenizer: Tokenizer,
    tail: Sequence[int],
    extras: Extras,
    *,
    hidden_size: int,
    layers: int,
    experts: int,
    experts_per_token: int,
    expert_width: int,
) -> TrainableReranker:
    """A fresh network (torch's generator decides its weights) whose language model says nothing yet.

    The rows of "yes" and "no" start equal: the log-odds are the score projection's alone, the ranker's score.
    experts: 0 = a dense network with as many active parameters in its MLPs.
    """
    heads = hidden_size // HEAD_DIM
    shape = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "head_dim": HEAD_DIM,
        "initializer_range": INIT_STD,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    lm: LanguageModel
    if experts:
        sparse = Qwen3MoeConfig(
            **shape,
            intermediate_size=expert_width,
            moe_intermediate_size=expert_width,
            num_experts=experts,
            num_experts_per_tok=experts_per_token,
            norm_topk_prob=True,
        )
        lm = Qwen3MoeForCausalLM(sparse)
    else:
        lm = Qwen3ForCausalLM(Qwen3Config(**shape, intermediate_size=experts_per_token * expert_width))
    yes, no = (tokenizer.encode(word, add_special_tokens=False).ids[0] for word in ("yes", "no"))
    with torch.no_grad():
        lm.lm_head.weight[no] = lm.lm_head.weight[yes]
    return TrainableReranker(lm, extras, yes, no, tail)
