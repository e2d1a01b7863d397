"""The forward on CUDA against transformers' in bfloat16. Needs a device."""

from __future__ import annotations

import pytest
import torch

from recsys.bench.rerank_cuda import LAYER, on_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_order_on_cuda_is_that_of_transformers() -> None:
    small = {**LAYER, "hidden_size": 512, "num_experts": 16, "num_attention_heads": 8}
    with torch.inference_mode():
        tau, *rest = on_cuda(small, candidates=50, prefix=64, suffix=8, repeats=2)
    assert tau.ours >= 0.9
    assert all(row.ours > 0 for row in rest)
