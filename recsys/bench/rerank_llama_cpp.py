"""[heavy] llama.cpp as a contestant of `bench rerank`, through llama-cpp-python's low-level API.

The prefix is decoded once, `llama_memory_seq_cp` lets every candidate see it in one unified cache, and all suffixes go
through one `llama_decode` with logits of each last token only.

Shape legend: N candidates, P prefix tokens, S tokens of a candidate, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llm_reranker.model import ModelConfig
from recsys.bench.rerank_peers import NO, YES
from recsys.core import Internal

INSTALL = "pip install llama-cpp-python gguf  (compiles llama.cpp: minutes, a C++ compiler)"
_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
_GRAPH_TOKENS = 256  # below it llama.cpp may pick kernels meant for single tokens


def installed() -> bool:
    """Whether the peer is there."""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def write_gguf(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor], kind: Literal["F32", "Q8_0"]) -> None:
    """A GGUF file of a Qwen3-MoE without a tokenizer; norms and router stay F32, as llama.cpp's own quantiser does."""
    import gguf

    w = gguf.GGUFWriter(path, "qwen3moe")
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_expert_feed_forward_length(config.moe_intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(config.head_dim)
    w.add_value_length(config.head_dim)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(config.rope_theta)
    w.add_expert_count(config.num_experts)
    w.add_expert_used_count(config.num_experts_per_tok)
    w.add_vocab_size(config.vocab_size)
    w.add_tokenizer_model("none")

    def add(name: str, tensor: Tensor, *, quantise: bool) -> None:
        values = tensor.float().contiguous().numpy()
        if quantise and kind == "Q8_0":
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            w.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            w.add_tensor(name, values)

    add("token_embd.weight", tensors["model.embed_tokens.weight"], quantise=True)
    add("output_norm.weight", tensors["model.norm.weight"], quantise=False)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for theirs, name in _NAMES.items():
            add(f"blk.{layer}.{name}.weight", tensors[f"{at}{theirs}.weight"], quantise=theirs.endswith("_proj"))
        for part in ("gate", "up", "down"):
            each = [tensors[f"{at}mlp.experts.{e}.{part}_proj.weight"] for e in range(config.num_experts)]
            add(f"blk.{layer}.ffn_{part}_exps.weight", torch.stack(each), quantise=True)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@dataclass(frozen=True, slots=True)
class Setting:
    """What the sweep varies: tokens of a graph, flash attention, and the type of cached keys and values."""

    ubatch: int
    flash: bool
    cache: Literal["f16", "f32"]

    def __str__(self) -> str:
        return f"ubatch {self.ubatch}, {'flash' if self.flash else 'plain'} attention, {self.cache} cache"


# Larger graphs and a float32 cache lost everywhere; plain attention is quickest only for a handful of candidates.
SETTINGS = [
    *(Setting(ubatch, True, "f16") for ubatch in (64, 128, 256, 512)),
    Setting(256, True, "f32"),
    *(Setting(ubatch, False, "f16") for ubatch in (128, 512)),
]


class LlamaCpp:
    """A model file and a context at one setting. `close` frees both."""

    def __init__(
        self, path: Path, kind: str, setting: Setting, *, tokens_max: int, sequences: int, threads: int
    ) -> None:
        """tokens_max: of prefix and all suffixes. sequences: candidates and one."""
        import llama_cpp as low

        self.name = f"llama.cpp {kind}, {setting}"
        self._low: Any = low
        _quiet()
        low.llama_backend_init()
        of_model = low.llama_model_default_params()
        of_model.n_gpu_layers = 0
        self._model = low.llama_model_load_from_file(str(path).encode(), of_model)
        params = low.llama_context_default_params()
        params.n_ctx = params.n_batch = max(_GRAPH_TOKENS, -(-tokens_max // 256) * 256)
        params.n_ubatch, params.n_seq_max = min(setting.ubatch, params.n_batch), sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified, params.no_perf, params.offload_kqv, params.op_offload = True, True, False, False
        params.flash_attn_type = int(setting.flash)  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED
        params.type_k = params.type_v = low.GGML_TYPE_F16 if setting.cache == "f16" else low.GGML_TYPE_F32
        self._context = low.llama_init_from_model(self._model, params)
        if not self._model or not self._context:
            raise Internal("llama.cpp", came="no context", expected=f"one with {self.name}", fix="See its log.")
        self._memory = low.llama_get_memory(self._context)
        self._batch = low.llama_batch_init(int(params.n_batch), 0, 1)
        self._prefix = 0
        self._vocabulary = low.llama_vocab_n_tokens(low.llama_model_get_vocab(self._model))

    def cold(self, prefix_P: Tensor, suffix_NS: Tensor) -> Tensor:
        """See Contestant."""
        low, self._prefix = self._low, len(prefix_P)
        low.llama_memory_clear(self._memory, False)
        self._fill(prefix_P.numpy(), np.arange(self._prefix), np.zeros(self._prefix, np.int32), np.zeros(self._prefix))
        self._decode()
        for candidate in range(1, len(suffix_NS) + 1):
            low.llama_memory_seq_cp(self._memory, 0, candidate, -1, -1)
        return self.warm(suffix_NS)

    def warm(self, suffix_NS: Tensor) -> Tensor:
        """See Contestant."""
        low, (n, s) = self._low, suffix_NS.shape
        low.llama_memory_seq_rm(self._memory, -1, self._prefix, -1)
        step_T = np.tile(np.arange(s), n)
        sequence_T = np.repeat(np.arange(1, n + 1, dtype=np.int32), s)
        self._fill(suffix_NS.numpy().ravel(), self._prefix + step_T, sequence_T, step_T == s - 1)
        self._decode()
        odds = []
        for i in range(n):
            logits = low.llama_get_logits_ith(self._context, i * s + s - 1)
            odds.append(logits[YES] - logits[NO])
        return torch.tensor(odds)

    def close(self) -> None:
        """Free the context and the model."""
        self._low.llama_batch_free(self._batch)
        self._low.llama_free(self._context)
        self._low.llama_model_free(self._model)

    def _fill(self, ids: Any, position: Any, sequence: Any, wanted: Any) -> None:
        b = self._batch
        b.n_tokens = len(ids)
        for pointer, values, kind in (
            (b.token, ids, np.int32),
            (b.pos, position, np.int32),
            (b.logits, wanted, np.int8),
        ):
            np.ctypeslib.as_array(pointer, (len(ids),))[:] = np.asarray(values, kind)
        for i, of in enumerate(sequence.tolist()):
            b.n_seq_id[i] = 1
            b.seq_id[i][0] = of

    def _decode(self) -> None:
        if code := self._low.llama_decode(self._context, self._batch):
            raise Internal("llama_decode", came=f"code {code}", expected="0", fix="Give the context more room.")


@cache
def _quiet() -> Any:
    """No log lines of llama.cpp on stderr; the callback that is returned must live on, and the cache keeps it."""
    import llama_cpp as low

    callback = low.llama_log_callback(lambda *_: None)
    low.llama_log_set(callback, ctypes.c_void_p(0))
    return callback
