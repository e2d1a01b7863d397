"""A recorded forward gives the states of the plain one, whatever was played before; and the engine on a device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from device_world import engine_elsewhere, played_again
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llm_reranker import checkpoint
from llm_reranker.attention import KeyValues, PackedCausal, SharedPrefix
from llm_reranker.base import HistoryItem, RerankRequest, RerankResult
from llm_reranker.config import RerankConfig
from llm_reranker.engine import Engine
from llm_reranker.graphs import Graphs
from llm_reranker.local import LocalReranker
from llm_reranker.model import Model, ModelConfig
from recsys.core import BadInput, Unavailable, metrics
from recsys.core.items import ItemTable
from recsys.core.run_dir import RunDirectory

NOW_US = 1_500_000_000_000_000
COMMON = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
KINDS = {
    "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
    "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **EXPERTS)),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    torch.manual_seed(3)
    KINDS[request.param]().save_pretrained(tmp_path)
    config = ModelConfig.from_json(checkpoint.read_json(tmp_path / "config.json"), "config.json")
    return Model(config, checkpoint.read_model_tensors(tmp_path, config))


def plainly(model: Model, ids: list[int], suffix_TD: Tensor, lengths: list[int]) -> tuple[KeyValues, Tensor]:
    context = PackedCausal([len(ids)], states=False)
    model.hidden(model.embed(torch.tensor(ids)), torch.arange(len(ids)), context)
    position = len(ids) + torch.cat([torch.arange(n) for n in lengths])
    return context.kept[0], model.hidden(suffix_TD, position, SharedPrefix(context.kept, [lengths], last_only=True))


@torch.inference_mode()
def test_played_back_states_are_those_of_the_plain_forward(model: Model) -> None:
    """Long and short in turn: what an earlier request left in the tensors is seen by nobody."""
    graphs, rng = Graphs(model, graphs_max=8, record=played_again), np.random.default_rng(0)
    for before, lengths in (
        (40, [5] * 12),
        (33, [3, 1, 8]),
        (1, [1]),
        (40, [2, 7, 7, 4, 1, 6]),
        (119, [8, 9]),
        (34, [1, 8]),
    ):
        ids = rng.integers(0, 60, before).tolist()
        suffix_TD = model.embed(torch.from_numpy(rng.integers(0, 60, sum(lengths))))
        kept, expected = plainly(model, ids, suffix_TD, lengths)
        prefix = graphs.prefix(ids)
        for pair, pair_kept in zip(prefix, kept, strict=True):
            assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(pair, pair_kept, strict=True))
        assert torch.allclose(graphs.states(prefix, suffix_TD, lengths), expected, atol=1e-4)
        assert expected.abs().max() > 0.5


@torch.inference_mode()
def test_sizes_share_recordings_and_only_so_many_are_kept(model: Model) -> None:
    made = []

    def counted(run):  # type: ignore[no-untyped-def]
        made.append(run)
        return played_again(run)

    graphs = Graphs(model, graphs_max=3, record=counted)
    for size in (9, 10, 16, 13):
        graphs.prefix([1] * size)
    assert len(made) == 1
    for size in (17, 30, 40, 9):
        graphs.prefix([1] * size)
        assert len(graphs) <= 3
    assert len(made) == 5  # the first had been dropped


def ask(n: int) -> RerankRequest:
    bought = HistoryItem(item_id="item-1", text="", event_type=5, event_time_us=0)
    features = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    return RerankRequest(
        request_id="r", as_of_us=NOW_US, history=[bought], item_ids=[f"item-{i}" for i in range(n - 1)] + ["new"],
        texts=[""] * (n - 1) + ["a red lamp"], features=features,
    )  # fmt: skip


def scores(engine: Engine, n: int = 30) -> np.ndarray:
    answer = engine.score([ask(n)], [0.0])[0]
    assert isinstance(answer, RerankResult)
    return answer.scores


def engine_on_cuda(folder: Path, items: ItemTable) -> Engine:
    return LocalReranker.from_folder(folder, items, config=RerankConfig(device="cuda", precision="bf16"))._engine


DEVICES = [
    engine_elsewhere,
    *([pytest.param(engine_on_cuda, marks=pytest.mark.gpu)] if torch.cuda.is_available() else []),
]


@pytest.mark.parametrize("mode", ["soft tokens", "text"])
@pytest.mark.parametrize("engine_on", DEVICES)
def test_a_device_scores_as_the_cpu_does(
    engine_on: Callable[[Path, ItemTable], Engine], mode: str, run: RunDirectory, world: ModuleType, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run.root / "reranker/1", tmp_path / "folder"))
    if mode == "text":
        for name in ("double11.json", "extras.safetensors", "items.safetensors"):
            (folder / name).unlink()
    expected = scores(LocalReranker.from_folder(folder, world.items())._engine)
    engine = engine_on(folder, world.items())
    assert scores(engine) == pytest.approx(expected, abs=0.05, rel=0.02)
    assert engine._graphs is not None, "nothing could be recorded"
    assert len(engine._graphs) == 2
    engine._graphs = None
    engine.forget_scores()
    assert scores(engine) == pytest.approx(expected, abs=0.05, rel=0.02)


def test_where_nothing_can_be_recorded_kernels_are_launched_one_by_one(run: RunDirectory, world: ModuleType) -> None:
    def refuses(_run: object) -> tuple[object, list[Tensor]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine, off = engine_elsewhere(run.root / "reranker/1", world.items()), metrics.RERANK_GRAPHS_OFF
    before, expected = off._value.get(), scores(engine)
    engine.forget_scores()
    engine._graphs = Graphs(engine._loaded.model, graphs_max=4, record=refuses)  # type: ignore[arg-type]
    assert scores(engine) == pytest.approx(expected, abs=0.02)
    engine.forget_scores()
    assert scores(engine, 12)[:11] == pytest.approx(expected[:11], abs=0.02)
    assert off._value.get() == before + 1


def test_device_and_precision_go_together() -> None:
    for device, precision in (("cuda", "fp32"), ("cpu", "bf16")):
        with pytest.raises(BadInput, match=f"{precision} on {device}"):
            RerankConfig(device=device, precision=precision)  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_said_so(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="VARIANT=cuda"):
        LocalReranker.load(run, config=RerankConfig(device="cuda", precision="bf16"))
