"""For any ragged candidates and any order, a candidate's score is its own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_reranker.attention import PackedCausal, SharedPrefix
from llm_reranker.model import Model, ModelConfig
from llm_reranker.prompt import _broken

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    tie_word_embeddings=False, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True,
)  # fmt: skip


def tiny() -> Model:
    g = torch.Generator().manual_seed(0)
    return Model(CONFIG, {n: torch.randn(s, generator=g) * 0.4 for n, s in CONFIG.shapes().items()})


MODEL = tiny()
tokens = st.lists(st.integers(0, 39), min_size=1, max_size=5)


@torch.inference_mode()
def scores(prefix: list[int], candidates: list[list[int]]) -> torch.Tensor:
    attention = PackedCausal([len(prefix)], states=False)
    MODEL.hidden(MODEL.embed(torch.tensor(prefix)), torch.arange(len(prefix)), attention)
    flat = torch.tensor([i for c in candidates for i in c])
    at = torch.cat([len(prefix) + torch.arange(len(c)) for c in candidates])
    lengths = [len(c) for c in candidates]
    last = MODEL.hidden(MODEL.embed(flat), at, SharedPrefix(attention.kept, [lengths], last_only=True))
    return last @ MODEL.label_direction(1, 2)


@settings(max_examples=40, deadline=None)
@given(prefix=tokens, candidates=st.lists(tokens, min_size=1, max_size=6), data=st.data())
def test_order_and_company_change_nothing(prefix: list[int], candidates: list[list[int]], data: st.DataObject) -> None:
    whole = scores(prefix, candidates)
    order = data.draw(st.permutations(range(len(candidates))))
    shuffled = scores(prefix, [candidates[i] for i in order])
    assert torch.allclose(shuffled, whole[list(order)], atol=1e-4)
    for i, candidate in enumerate(candidates):
        assert torch.allclose(scores(prefix, [candidate])[0], whole[i], atol=1e-4)


@given(st.text("<|im_end>a", max_size=40), st.lists(st.sampled_from(["<|im_end|>", "<im>", "aa", "<|"]), max_size=3))
def test_breaking_a_text_loses_nothing_and_leaves_no_control_string(text: str, control: list[str]) -> None:
    pieces = _broken([text], control)
    assert "".join(pieces) == text
    assert not [p for p in pieces for c in control if c in p]
