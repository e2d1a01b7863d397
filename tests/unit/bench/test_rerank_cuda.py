"""The forward on a device against transformers' in bfloat16: on CUDA where there is one, elsewhere anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_world import elsewhere, played_again

from recsys.bench.rerank_cuda import LAYER, on_device

FEW = {
    **LAYER, "hidden_size": 128, "num_experts": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
ELSEWHERE = {"device": elsewhere(), "record": played_again, "wait": lambda: None, "gemm": 64}
DEVICES = [ELSEWHERE, *([pytest.param({}, marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_the_order_on_a_device_is_that_of_transformers(device: dict[str, Any]) -> None:
    against_theirs, against_ours, *rest = on_device(FEW, candidates=50, prefix=30, suffix=5, repeats=1, **device)
    assert against_theirs.ours >= 0.9
    assert against_ours.ours >= 0.98
    assert len(rest) == 4
    assert all(row.ours > 0 for row in rest)
