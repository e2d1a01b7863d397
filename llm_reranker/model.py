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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_reranker.linear import Linear, Precision, linear
from recsys.core.errors import CorruptData

# keys and values of one sequence: per layer k_GPd and v_GPd
KeyValues = list[tuple[Tensor, Tensor]]


class Attention(Protocol):
    """Who sees whom among T tokens.

    wanted_L: the tokens whose final states are wanted, None for all; the others go as far as the last layer's keys and
    values.
    """

    wanted_L: Tensor | None

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """What each token takes from those it sees, [T, H, d]; in the last layer q and answer are of the wanted L."""
        ...


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
            for name in names:
                if name in config:
                    return config[name]
            raise CorruptData(
                what, came=f"no {' or '.join(names)}", expected="every architecture key", fix="Take the folder whole."
            )

        def only(name: str, value: object, *allowed: object) -> None:
            if value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise CorruptData(f"{what}, {name}", came=value, expected=expected, fix="Use a Qwen3 checkpoint.")

        only("model_type", need("model_type"), "qwen3", "qwen3_moe")
        only("hidden_act", need("hidden_act"), "silu")
        only("attention_bias", need("attention_bias"), False)
        only("use_sliding_window", need("use_sliding_window"), False)
        rope = config.get("rope_parameters")
        if rope is None:
            only("rope_scaling", config.get("rope_scaling"), None)
            rope = {"rope_theta": need("rope_theta"), "rope_type": "default"}
        only("rope_parameters.rope_type", rope.get("rope_type"), "default")
        if "rope_theta" not in rope:
            raise CorruptData(
                f"{what}, rope_parameters", came=rope, expected="rope_theta", fix="Take the folder whole."
            )
        moe = need("model_type") == "qwen3_moe"
        plain: tuple[str, ...] = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        plain += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
        sparse = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
        values = {name: need(name) for name in (plain + sparse if moe else plain)}
        if moe:
            values["num_experts"] = need("num_local_experts", "num_experts")
            values["mlp_only_layers"] = tuple(need("mlp_only_layers"))
        return cls(rope_theta=float(rope["rope_theta"]), **values)

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
    """One layer's weights, projections that share an input fused. router_ED is None in a dense layer (E = 1)."""

    attn_norm_D: Tensor
    qkv: Linear
    q_norm_d: Tensor
    k_norm_d: Tensor
    o: Linear
    mlp_norm_D: Tensor
    router_ED: Tensor | None
    gate_up: tuple[Linear, ...]  # E of [2W, D]
    down: tuple[Linear, ...]  # E of [D, W]


class Model:
    """The network without its head. Weights never change; norms, router, embeddings and attention are float32."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], precision: Precision = "fp32") -> None:
        """tensors: by Hugging Face name, as `config.shapes()` lists them (llm_reranker.checkpoint checks that).

        precision: of the projections and the experts.
        """
        self.config = config
        self.embed_VD = tensors["model.embed_tokens.weight"]
        self.head_VD = self.embed_VD if config.tie_word_embeddings else tensors["lm_head.weight"]
        self._norm_D = tensors["model.norm.weight"]
        self._layers = [_layer(config, tensors, i, precision) for i in range(config.num_hidden_layers)]
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self._inverse_frequency = 1.0 / config.rope_theta**half

    def embed(self, ids_T: Tensor) -> Tensor:
        """Token ids int64 [T] to input vectors [T, D]."""
        return self.embed_VD[ids_T]

    def label_direction(self, yes: int, no: int) -> Tensor:
        """w_yes - w_no, [D]: hidden . direction is the log-odds of "yes" against "no", no vocabulary needed."""
        return self.head_VD[yes] - self.head_VD[no]

    def hidden(self, x_TD: Tensor, position_T: Tensor, attention: Attention) -> Tensor:
        """Final states (after the last norm) of T input vectors at their positions in their sequences.

        [L, D] of the tokens that the attention wants, [T, D] where it wants all.
        """
        c = self.config
        angle = position_T[:, None].float() * self._inverse_frequency
        cos, sin = torch.cat([angle.cos()] * 2, -1)[:, None], torch.cat([angle.sin()] * 2, -1)[:, None]  # [T, 1, d]
        heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(rms_norm(x_TD, layer.attn_norm_D, c.rms_norm_eps))
            q_THd, k_TGd, v_TGd = torch.split(qkv.view(len(x_TD), -1, c.head_dim), heads, dim=1)
            q_THd = _rotate(rms_norm(q_THd, layer.q_norm_d, c.rms_norm_eps), cos, sin)
            k_TGd = _rotate(rms_norm(k_TGd, layer.k_norm_d, c.rms_norm_eps), cos, sin)
            if layer is self._layers[-1] and attention.wanted_L is not None:
                x_TD, q_THd = x_TD[attention.wanted_L], q_THd[attention.wanted_L]
            x_TD = x_TD + layer.o(attention(index, q_THd, k_TGd, v_TGd).flatten(1))
            x_TD = x_TD + self._mlp(layer, rms_norm(x_TD, layer.mlp_norm_D, c.rms_norm_eps))
        return rms_norm(x_TD, self._norm_D, c.rms_norm_eps)

    def _mlp(self, layer: _Layer, x_TD: Tensor) -> Tensor:
        if layer.router_ED is None:
            return _swiglu(x_TD, layer.gate_up[0], layer.down[0])
        c = self.config
        probability_TE = F.linear(x_TD, layer.router_ED).softmax(-1, dtype=torch.float32)
        weight_TK, expert_TK = probability_TE.topk(c.num_experts_per_tok, dim=-1)
        if c.norm_topk_prob:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        # Sorted by expert, the tokens of one expert are neighbours: one GEMM per expert, whoever asked.
        order = expert_TK.flatten().argsort(stable=True)
        counts = torch.bincount(expert_TK.flatten(), minlength=c.num_experts).tolist()
        tokens = torch.split(order // c.num_experts_per_tok, counts)
        weights = torch.split(weight_TK.flatten()[order, None].to(x_TD.dtype), counts)
        y_TD = torch.zeros_like(x_TD)
        for gate_up, down, rows, weight in zip(layer.gate_up, layer.down, tokens, weights, strict=True):
            if len(rows):
                y_TD.index_add_(0, rows, _swiglu(x_TD[rows], gate_up, down) * weight)
        return y_TD


class PackedCausal:
    """Attention inside each of several sequences that lie one after another; keeps keys and values by sequence.

    states: False where only the kept keys and values are wanted, as of a prefix.
    """

    def __init__(self, lengths: Sequence[int], *, states: bool = True) -> None:
        self._lengths = list(lengths)
        self.wanted_L: Tensor | None = None if states else torch.empty(0, dtype=torch.long)
        self.kept: list[KeyValues] = [[] for _ in lengths]

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """See Attention."""
        k_parts, v_parts = (torch.split(x.transpose(0, 1), self._lengths, dim=1) for x in (k_TGd, v_TGd))
        for kept, k, v in zip(self.kept, k_parts, v_parts, strict=True):
            kept.append((k.contiguous(), v.contiguous()))
        if not len(q_THd):
            return q_THd
        out = []
        for q, k, v in zip(torch.split(q_THd.transpose(0, 1), self._lengths, dim=1), k_parts, v_parts, strict=True):
            o = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
            out.append(o[0].transpose(0, 1))
        return torch.cat(out)


class SharedPrefix:
    """Attention of candidates that see one prefix and themselves, never each other.

    Tokens of one request's candidates lie one after another, requests one after another. Cost is linear in N. What a
    token takes from the prefix and what it takes from its own candidate are computed apart by the fused kernel and
    joined by their log sums of exponentials (arXiv 2205.14135, section 3.1), so no [T, P] weights are ever in memory.
    """

    def __init__(
        self, prefixes: Sequence[KeyValues], suffix_lengths: Sequence[Sequence[int]], *, last_only: bool = False
    ) -> None:
        """prefixes: per request. suffix_lengths: per request, tokens of each candidate (ragged is fine).

        last_only: the state of each candidate's last token is all that is wanted.
        """
        self._prefixes, self._lengths = prefixes, [torch.tensor(lengths) for lengths in suffix_lengths]
        self._tokens = [sum(lengths) for lengths in suffix_lengths]
        self.wanted_L = torch.cat(self._lengths).cumsum(0) - 1 if last_only else None

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        """See Attention."""
        of_last = len(q_THd) != len(k_TGd)
        queries = torch.split(q_THd, [len(n) for n in self._lengths] if of_last else self._tokens)
        parts = zip(queries, *(torch.split(x, self._tokens) for x in (k_TGd, v_TGd)), strict=True)
        out = []
        for kv, lengths_N, (q, k, v) in zip(self._prefixes, self._lengths, parts, strict=True):
            o_prefix, lse_prefix = _to_prefix(q, *kv[layer])
            o_own, lse_own = _to_own(q, k, v, lengths_N)
            out.append(torch.lerp(o_prefix, o_own, torch.sigmoid(lse_own - lse_prefix)[..., None]))
        return torch.cat(out)


def _to_prefix(q_THd: Tensor, k_GPd: Tensor, v_GPd: Tensor) -> tuple[Tensor, Tensor]:
    """What each token takes from the whole prefix [T, H, d], and the log sum of exponentials of its scores [T, H]."""
    (t, h, d), g = q_THd.shape, len(k_GPd)
    q_GXd = q_THd.view(t, g, -1, d).transpose(0, 1).reshape(g, -1, d)  # X = T x R: no copy of keys and values
    o_GXd, lse_GX = (x[0] for x in _attend(q_GXd[None], k_GPd[None], v_GPd[None]))
    return (
        o_GXd.view(g, t, -1, d).transpose(0, 1).reshape(t, h, d),
        lse_GX.reshape(g, t, -1).transpose(0, 1).reshape(t, h),
    )


def _to_own(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a candidate's own tokens up to itself; with N queries, of each candidate's last token."""
    rows_NS, real_NS = _layout(lengths_N)
    r = q_THd.shape[1] // k_TGd.shape[1]
    k_NHSd, v_NHSd = (x[rows_NS].transpose(1, 2).repeat_interleave(r, 1) for x in (k_TGd, v_TGd))
    if len(q_THd) == len(k_TGd):
        # A padded place comes after every real one of its candidate, so causality alone hides it from real tokens.
        o_NHSd, lse_NHS = _attend(q_THd[rows_NS].transpose(1, 2), k_NHSd, v_NHSd, causal=True)
        return o_NHSd.transpose(1, 2)[real_NS], lse_NHS.transpose(1, 2)[real_NS]
    hidden_NS = torch.zeros(real_NS.shape).masked_fill_(~real_NS, -torch.inf)
    o_NH1d, lse_NH1 = _attend(q_THd[:, :, None], k_NHSd, v_NHSd, mask=hidden_NS[:, None, None])
    return o_NH1d[:, :, 0], lse_NH1[:, :, 0]


def _attend(
    q_BHTd: Tensor, k_BHPd: Tensor, v_BHPd: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The fused kernel behind scaled_dot_product_attention, which also gives the log sums of exponentials [B, H, T]."""
    o_BHTd, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHTd, k_BHPd, v_BHPd, 0.0, causal, attn_mask=mask
    )
    return o_BHTd, lse_BHT


def _layout(lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """Token row [N, S] of each padded place (0 where padded), and which places are real."""
    lengths_N1 = lengths_N[:, None]
    start_N1 = lengths_N1.cumsum(0) - lengths_N1
    step_S = torch.arange(int(lengths_N1.max()))
    real_NS = step_S < lengths_N1
    return torch.where(real_NS, start_N1 + step_S, 0), real_NS


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale x to unit mean square over its last axis, in float32, times weight. Source: arXiv 1910.07467."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos + torch.cat([-second, first], -1) * sin


def _swiglu(x_TD: Tensor, gate_up: Linear, down: Linear) -> Tensor:
    gate, up = gate_up(x_TD).chunk(2, dim=-1)
    return down(F.silu(gate) * up)


def _layer(config: ModelConfig, tensors: Mapping[str, Tensor], index: int, precision: Precision) -> _Layer:
    def at(name: str) -> Tensor:
        return tensors[f"model.layers.{index}.{name}.weight"]

    sparse = config.is_sparse(index)
    mlps = [f"mlp.experts.{e}." for e in range(config.num_experts)] if sparse else ["mlp."]
    return _Layer(
        attn_norm_D=at("input_layernorm"),
        qkv=linear(torch.cat([at(f"self_attn.{n}_proj") for n in "qkv"]), precision),
        q_norm_d=at("self_attn.q_norm"),
        k_norm_d=at("self_attn.k_norm"),
        o=linear(at("self_attn.o_proj"), precision),
        mlp_norm_D=at("post_attention_layernorm"),
        router_ED=at("mlp.gate") if sparse else None,
        gate_up=tuple(linear(torch.cat([at(f"{m}gate_proj"), at(f"{m}up_proj")]), precision) for m in mlps),
        down=tuple(linear(at(f"{m}down_proj"), precision) for m in mlps),
    )
