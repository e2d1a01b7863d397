"""Qwen3-MoE and dense Qwen3, forward only, for serving: flat tokens in, final hidden states out. Heavy: torch.

The layer: pre-RMSNorm (fp32 inside); q, k, v, o without bias; RMSNorm per head on q and k, then RoPE (rotate-half);
softmax over all experts in fp32, top-k, renormalised if `norm_topk_prob`; expert = down(silu(gate x) * up x).
Tokens of all requests lie in one flat axis; who sees whom is the business of an `Attention`.

Shape legend: T tokens of all sequences, D hidden, H query heads, G key/value heads, R = H/G, d head_dim, E experts,
K experts per token, W expert width, P prefix tokens, N candidates, S suffix tokens of one candidate, V vocabulary,
L tokens whose final states are wanted.
Source: arXiv 2505.09388 (Qwen3); transformers/models/qwen3_moe/modeling_qwen3_moe.py, which tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_reranker.attention import Attention
from llm_reranker.experts import GroupedMixture, Mixture, SwiGLU
from llm_reranker.linear import Linear, Precision, linear
from llm_reranker.loops import norm_and_turn
from recsys.core.errors import CorruptData

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_SPARSE_COUNTS = ("num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
_POSITIONS_MAX = 1 << 16  # beyond any prefix and candidate that is let in, whatever the checkpoint says it knows


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What config.json says about the architecture. num_experts is 0 for dense Qwen3."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, config: Mapping[str, Any], what: str) -> ModelConfig:
        """Read either dialect: transformers 5 (`num_local_experts`, `rope_parameters`) or older files.

        what: the file, for messages.
        Raises: CorruptData for a missing key (never a default) or an architecture this forward does not have.
        """

        def need(*names: str) -> Any:
            found = [config[name] for name in names if name in config]
            if not found:
                raise CorruptData(
                    what,
                    came=f"no {' or '.join(names)}",
                    expected="every architecture key",
                    fix="Take the folder whole.",
                )
            return only(" and ".join(names), found[0], *found[1:]) if len(found) > 1 else found[0]

        def only(name: str, value: Any, *allowed: object) -> Any:
            if value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise CorruptData(f"{what}, {name}", came=value, expected=expected, fix="Use a Qwen3 checkpoint.")
            return value

        only("model_type", need("model_type"), "qwen3", "qwen3_moe")
        only("hidden_act", need("hidden_act"), "silu")
        only("attention_bias", need("attention_bias"), False)
        only("use_sliding_window", need("use_sliding_window"), False)
        # As transformers looks: what somebody added in the words of the older dialect outdoes what was saved.
        told = next((n for n in ("rope_scaling", "rope_parameters") if config.get(n)), "rope_parameters")
        rope = config.get(told) or {}
        if not isinstance(rope, Mapping):
            raise CorruptData(f"{what}, {told}", came=rope, expected="rope_theta", fix="Take the folder whole.")
        rope_theta = rope["rope_theta"] if "rope_theta" in rope else need("rope_theta")
        only(f"{told}.rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
        only(f"{told}.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
        moe = need("model_type") == "qwen3_moe"
        values = {name: need(name) for name in (*_COUNTS, "rms_norm_eps", "tie_word_embeddings")}
        if moe:
            values |= {name: need(name) for name in (*_SPARSE_COUNTS, "norm_topk_prob")}
            values["num_experts"] = need("num_experts", "num_local_experts")
            values["mlp_only_layers"] = tuple(need("mlp_only_layers") or ())
        made = cls(rope_theta=rope_theta, **values)
        for name, came, expected in made._wrong():
            raise CorruptData(f"{what}, {name}", came=came, expected=expected, fix="Take the folder as it was saved.")
        return made

    def _wrong(self) -> Iterator[tuple[str, object, str]]:
        """What no checkpoint can mean: name, value, what it should be."""
        sparse = (*_SPARSE_COUNTS, "num_experts") if self.num_experts else ()
        for name in (*_COUNTS, *sparse):
            if type(value := getattr(self, name)) is not int or value < 1:
                yield name, value, "a whole number above 0"
        for name in ("rms_norm_eps", "rope_theta"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 < value < math.inf:
                yield name, value, "a number above 0"
        for name in ("tie_word_embeddings", "norm_topk_prob"):
            if type(value := getattr(self, name)) is not bool:
                yield name, value, "true or false"
        if self.num_attention_heads % self.num_key_value_heads:
            yield "num_key_value_heads", self.num_key_value_heads, f"a divisor of {self.num_attention_heads} heads"
        if self.head_dim % 2:
            yield "head_dim", self.head_dim, "an even number, which RoPE turns in pairs"
        if self.num_experts_per_tok > self.num_experts:
            yield "num_experts_per_tok", self.num_experts_per_tok, f"at most {self.num_experts} experts"

    def is_sparse(self, layer: int) -> bool:
        """True when the layer's MLP is a mixture of experts."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with, embedding and head left out."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        total = self.num_hidden_layers * self.hidden_size * heads * self.head_dim
        for layer in range(self.num_hidden_layers):
            if self.is_sparse(layer):
                per_expert = 3 * self.hidden_size * self.moe_intermediate_size
                total += self.num_experts_per_tok * per_expert + self.hidden_size * self.num_experts
            else:
                total += 3 * self.hidden_size * self.intermediate_size
        return total

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a Hugging Face checkpoint of this architecture, by name."""
        d, hd = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * hd, self.num_key_value_heads * hd
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, d),
            "model.norm.weight": (d,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        for layer in range(self.num_hidden_layers):
            at = f"model.layers.{layer}."
            shapes |= {f"{at}input_layernorm.weight": (d,), f"{at}post_attention_layernorm.weight": (d,)}
            shapes |= {f"{at}self_attn.{n}_proj.weight": (rows, d) for n, rows in (("q", q), ("k", kv), ("v", kv))}
            shapes |= {f"{at}self_attn.o_proj.weight": (d, q)}
            shapes |= {f"{at}self_attn.{n}_norm.weight": (hd,) for n in "qk"}
            mlps, width = [f"{at}mlp."], self.intermediate_size
            if self.is_sparse(layer):
                shapes[f"{at}mlp.gate.weight"] = (self.num_experts, d)
                mlps, width = [f"{at}mlp.experts.{e}." for e in range(self.num_experts)], self.moe_intermediate_size
            for mlp in mlps:
                shapes |= {f"{mlp}{n}_proj.weight": (width, d) for n in ("gate", "up")}
                shapes |= {f"{mlp}down_proj.weight": (d, width)}
        return shapes


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer. Queries are apart from keys and values: the last layer asks only for those of the wanted tokens."""

    attn_norm_D: Tensor
    q: Linear
    kv: Linear
    q_norm_d: Tensor
    k_norm_d: Tensor
    o: Linear
    mlp_norm_D: Tensor
    mlp: Callable[[Tensor], Tensor]


class Model:
    """The network without its head. Weights never change; norms, router, embeddings and attention are float32.

    On CUDA everything is bfloat16, norms and routing float32 inside.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], precision: Precision = "fp32") -> None:
        """tensors: by Hugging Face name, as `config.shapes()` lists them (llm_reranker.checkpoint checks that).

        precision: of the projections and the experts; "bf16" of all, and for where the tensors are, CUDA.
        """
        self.config = config
        if precision == "bf16":
            tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        self.embed_VD = tensors["model.embed_tokens.weight"]
        self.head_VD = self.embed_VD if config.tie_word_embeddings else tensors["lm_head.weight"]
        self._norm_D = tensors["model.norm.weight"]
        self._layers = [_layer(config, tensors, i, precision) for i in range(config.num_hidden_layers)]
        self.device = self.embed_VD.device
        self._turn_P2c = _turns(config, self.device)
        self.positions = len(self._turn_P2c)  # a token's position is below it

    def embed(self, ids_T: Tensor) -> Tensor:
        """Token ids int64 [T] to input vectors [T, D]."""
        return F.embedding(ids_T, self.embed_VD)  # a fifth of the time of indexing

    def label_direction(self, yes: int, no: int) -> Tensor:
        """w_yes - w_no, float32 [D]: hidden . direction is the log-odds of "yes" against "no", no vocabulary needed."""
        return self.head_VD[yes].float() - self.head_VD[no].float()

    def hidden(self, x_TD: Tensor, position_T: Tensor, attention: Attention) -> Tensor:
        """Final states (after the last norm) of T input vectors at their positions in their sequences.

        [L, D] of the tokens that the attention wants, [T, D] where it wants all.
        """
        c, t = self.config, len(x_TD)
        turn_T2c = self._turn_P2c.index_select(0, position_T)
        for index, layer in enumerate(self._layers):
            normed_TD = rms_norm(x_TD, layer.attn_norm_D, c.rms_norm_eps)
            inputs = layer.kv.inputs(normed_TD)
            kv_TFd = layer.kv.product(inputs)[:t].view(t, 2 * c.num_key_value_heads, c.head_dim)  # F = 2 x G
            v_TGd = kv_TFd[:, c.num_key_value_heads :]
            k_TGd = _turned(kv_TFd, c.num_key_value_heads, layer.k_norm_d, turn_T2c, c.rms_norm_eps)
            if layer is self._layers[-1] and (wanted_L := attention.wanted_L) is not None:
                x_TD, normed_TD, turn_T2c = (x.index_select(0, wanted_L) for x in (x_TD, normed_TD, turn_T2c))
                inputs = layer.q.inputs(normed_TD)
            q_THd = layer.q.product(inputs)[: len(x_TD)].view(-1, c.num_attention_heads, c.head_dim)
            q_THd = _turned(q_THd, c.num_attention_heads, layer.q_norm_d, turn_T2c, c.rms_norm_eps)
            seen = attention(index, q_THd, k_TGd, v_TGd)
            if not len(x_TD):
                break
            x_TD = layer.o(seen.flatten(1)).add_(x_TD)
            x_TD = layer.mlp(rms_norm(x_TD, layer.mlp_norm_D, c.rms_norm_eps)).add_(x_TD)
        return rms_norm(x_TD, self._norm_D, c.rms_norm_eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale x to unit mean square over its last axis, in float32, times weight. Source: arXiv 1910.07467."""
    y = x.float()
    mean_square: Tensor = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    y = y * mean_square.add_(eps).rsqrt_()
    return y.mul_(weight) if x.dtype == torch.float32 else y.to(x.dtype).mul_(weight)


def _turns(config: ModelConfig, device: torch.device) -> Tensor:
    """RoPE's cosines and sines at every position that may be asked for, [positions, 2, d / 2]."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = min(config.max_position_embeddings, _POSITIONS_MAX)
    position = torch.arange(positions, dtype=torch.float32, device=device)
    angle = position[:, None] * (1.0 / config.rope_theta**half)
    return torch.stack([angle.cos(), angle.sin()], 1)


def _turned(x_THd: Tensor, heads: int, weight_d: Tensor, turn_T2c: Tensor, eps: float) -> Tensor:
    """RMSNorm, then RoPE, of the first heads. x_THd may change: it is the caller's to forget."""
    if x_THd.dtype == torch.float32 and x_THd.device.type == "cpu":
        # Rows of a head are so short that torch's passes over them take four times as long.
        norm_and_turn(x_THd.numpy(), heads, weight_d.numpy(), turn_T2c.numpy(), eps)
        return x_THd[:, :heads]
    a, b = rms_norm(x_THd[:, :heads], weight_d, eps).float().chunk(2, -1)
    cos, sin = turn_T2c[:, None].unbind(2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x_THd.dtype)


def _layer(config: ModelConfig, tensors: Mapping[str, Tensor], index: int, precision: Precision) -> _Layer:
    def at(name: str) -> Tensor:
        return tensors[f"model.layers.{index}.{name}.weight"]

    return _Layer(
        attn_norm_D=at("input_layernorm"),
        q=linear(at("self_attn.q_proj"), precision),
        kv=linear(torch.cat([at("self_attn.k_proj"), at("self_attn.v_proj")]), precision),
        q_norm_d=at("self_attn.q_norm"),
        k_norm_d=at("self_attn.k_norm"),
        o=linear(at("self_attn.o_proj"), precision),
        mlp_norm_D=at("post_attention_layernorm"),
        mlp=_mlp(config, at, config.is_sparse(index), precision),
    )


def _mlp(
    config: ModelConfig, at: Callable[[str], Tensor], sparse: bool, precision: Precision
) -> SwiGLU | Mixture | GroupedMixture:
    mlps = [f"mlp.experts.{e}." for e in range(config.num_experts)] if sparse else ["mlp."]
    pairs = [(torch.cat([at(f"{m}gate_proj"), at(f"{m}up_proj")]), at(f"{m}down_proj")) for m in mlps]
    per_token, normed = config.num_experts_per_tok, config.norm_topk_prob
    if sparse and precision == "bf16":
        gate_up, down = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return GroupedMixture(at("mlp.gate"), gate_up, down, per_token=per_token, normed=normed)
    experts = [SwiGLU(linear(gate_up, precision), linear(down, precision)) for gate_up, down in pairs]
    return Mixture(at("mlp.gate"), experts, per_token=per_token, normed=normed) if sparse else experts[0]
