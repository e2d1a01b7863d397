"""A mixture of experts made from a trained dense network that says the same, to be trained on. Heavy: torch.

The dense MLP is cut into K slices, one expert each, and every slice is copied E / K times. The router starts with the
same row for the K experts of one copy, so the best K are always a whole MLP; weights are renormalised to 1 / K, and the
slices' output is scaled by K. So the first forward equals the dense one, whatever the router says; training then tells
copies apart. Source: sparse upcycling, arXiv 2212.05055, with the virtual groups of arXiv 2410.07524 (section 3) for
experts narrower than the dense MLP; Qwen1.5-MoE was started likewise.

Shape legend: E experts, K experts per token, W expert width, D hidden.
"""

from __future__ import annotations

import torch
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from recsys.core.errors import BadInput


def upcycle(dense: Qwen3ForCausalLM, moe: Qwen3MoeForCausalLM) -> None:
    """Set the weights of `moe` from `dense`, in place; torch's generator decides the router.

    Raises: BadInput when the shapes do not fit: E a multiple of K, dense width K W, the same attention.
    """
    c, d = moe.config, dense.config
    experts, per_token, width = c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    if (
        experts % per_token
        or d.intermediate_size != per_token * width
        or not c.norm_topk_prob
        or any(getattr(c, n) != getattr(d, n) for n in same)
    ):
        raise BadInput(
            "upcycling",
            came=f"a dense MLP of width {d.intermediate_size} for {experts} experts top-{per_token} of width {width}",
            expected="num_experts a multiple of experts_per_token, and the dense width their product with expert_width",
            fix="Choose such sizes in [llm_reranker.distill].",
        )
    with torch.no_grad():
        moe.load_state_dict({n: t for n, t in dense.state_dict().items() if ".mlp." not in n}, strict=False)
        for to, of in zip(moe.model.layers, dense.model.layers, strict=True):
            gate_up_K = [
                torch.cat(
                    [of.mlp.gate_proj.weight[s : s + width], of.mlp.up_proj.weight[s : s + width]]
                )
                for s in range(0, per_token * width, width)
            ]  # fmt: skip
            down_K = [of.mlp.down_proj.weight[:, s : s + width] * per_token for s in range(0, per_token * width, width)]
            for e in range(experts):
                to.mlp.experts.gate_up_proj[e] = gate_up_K[e % per_token]
                to.mlp.experts.down_proj[e] = down_K[e % per_token]
            rows = torch.randn(experts // per_token, c.hidden_size) * c.initializer_range
            to.mlp.gate.weight.copy_(rows.repeat_interleave(per_token, 0))
