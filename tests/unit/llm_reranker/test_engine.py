"""Depth under a short deadline, the prefix cache's bound, plain Hugging Face folders, damaged folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import kendalltau

from llm_reranker.base import HistoryItem, RerankRequest
from llm_reranker.config import RerankConfig
from llm_reranker.local import LocalReranker
from llm_reranker.prefix_cache import PrefixCache
from llm_reranker.prompt import item_texts
from llm_reranker.score_cache import ScoreCache
from recsys.core import BadInput, CorruptData, Deadline, DeadlineExceeded, NotFound, VersionMismatch, keys
from recsys.core.run_dir import RunDirectory

NOW_US = 1_500_000_000_000_000


def ask(n: int, features: int = 3) -> RerankRequest:
    bought = HistoryItem(item_id="item-1", text="", event_type=5, event_time_us=0)
    return RerankRequest(
        request_id="r", as_of_us=NOW_US, history=[bought],
        item_ids=[f"item-{i}" for i in range(n)], texts=[""] * n, features=np.zeros((n, features), np.float32),
    )  # fmt: skip


@pytest.fixture
def folder(run: RunDirectory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.root / "reranker/1", tmp_path / "folder"))


def test_too_few_tokens_cut_the_depth_and_the_rest_is_nan(run: RunDirectory) -> None:
    engine = LocalReranker.load(run)._engine
    whole = engine.score([ask(40)], [0.0])[0]
    room = engine.cost_tokens(ask(15))
    cut, late = engine.score([ask(40)], [0.0], room)[0], engine.score([ask(40)], [0.0], 3)[0]
    assert isinstance(late, DeadlineExceeded)
    assert not isinstance(cut, Exception)
    assert not isinstance(whole, Exception)
    assert cut.depth == 15
    assert cut.scores[:15] == pytest.approx(whole.scores[:15], abs=1e-5)
    assert np.isnan(cut.scores[15:]).all()


def test_int8_keeps_the_order(run: RunDirectory) -> None:
    many = ask(60)
    many = replace(many, features=np.random.default_rng(0).normal(size=many.features.shape).astype(np.float32))
    scores = []
    for precision in ("fp32", "int8"):
        answer = LocalReranker.load(run, config=RerankConfig(precision=precision))._engine.score([many], [0.0])[0]
        assert not isinstance(answer, Exception)
        scores.append(answer.scores)
    assert kendalltau(*scores).statistic >= 0.98
    assert not np.array_equal(*scores)


def test_a_history_without_texts_is_looked_up_as_candidates_are(run: RunDirectory, world: ModuleType) -> None:
    engine, asked = LocalReranker.load(run)._engine, ask(5)
    texts = item_texts(world.items(), keys([h.item_id for h in asked.history]))
    assert all(" | " in text for text in texts)
    told = replace(asked, history=[replace(h, text=t) for h, t in zip(asked.history, texts, strict=True)])
    nameless = replace(asked, history=[replace(h, item_id="never seen") for h in asked.history])
    scores = [engine.score([request], [0.0])[0].scores for request in (asked, told, nameless)]
    assert scores[0].tolist() == scores[1].tolist() != scores[2].tolist()


def test_a_late_first_request_does_not_take_the_others_with_it(run: RunDirectory) -> None:
    engine = LocalReranker.load(run)._engine
    late, fine = engine.score([ask(40), ask(2)], [0.0, 0.0], engine.cost_tokens(ask(2)))
    assert isinstance(late, DeadlineExceeded)
    assert not isinstance(fine, Exception)
    assert fine.depth == 2


async def test_a_slow_machine_scores_fewer_and_a_hopeless_one_says_so(run: RunDirectory) -> None:
    reranker = LocalReranker.load(run)
    engine = reranker._engine
    engine.speed.fixed_ms, engine.speed.token_ms, engine.speed.factor = 0.0, 4.0, 1.0
    result = await reranker.rerank(ask(200), Deadline.after_ms(1000))
    assert 0 < result.depth < 100
    engine.speed.token_ms = 1e6
    with pytest.raises(DeadlineExceeded):
        await reranker.rerank(ask(200), Deadline.after_ms(1000))
    reranker.close()


def test_the_prefix_cache_keeps_its_bytes() -> None:
    kv = [(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))]  # 320 bytes
    cache = PrefixCache(700)
    for i in range(4):
        cache.put((i,), kv)
    assert (cache.used_bytes, len(cache)) == (640, 2)
    assert cache.get((2,)) is kv
    cache.put((4,), kv)  # drops 3, the least recently used
    assert [(i,) in cache for i in range(5)] == [False, False, True, False, True]
    assert PrefixCache(100).put((1,), kv) is None


async def test_a_plain_hugging_face_folder_scores_in_text_mode(folder: Path, world: ModuleType) -> None:
    for name in ("double11.json", "extras.safetensors", "items.safetensors"):
        (folder / name).unlink()
    reranker = LocalReranker.from_folder(folder, world.items())
    assert reranker.feature_names == ()
    result = await reranker.rerank(ask(20, features=0), Deadline.never())
    assert np.isfinite(result.scores).all()
    again = await reranker.rerank(ask(5, features=0), Deadline.never())
    assert again.scores == pytest.approx(result.scores[:5], abs=1e-5)
    reranker.close()


@pytest.mark.parametrize("damage", ["weights", "extras shape", "items shape", "card json", "card key", "card format",
                                    "tokenizer", "no tokenizer", "calibration"])  # fmt: skip
def test_a_damaged_folder_does_not_serve(damage: str, folder: Path, world: ModuleType) -> None:
    error: type[Exception] = CorruptData
    card_path = folder / "double11.json"
    card = json.loads(card_path.read_text())
    if damage in ("weights", "extras shape", "items shape"):
        path = folder / {"weights": "model", "extras shape": "extras", "items shape": "items"}[damage]
        path = path.with_suffix(".safetensors")
        tensors = load_file(path)
        name = {"weights": "model.norm.weight", "extras shape": "score.weight", "items shape": "soft"}[damage]
        tensors[name] = tensors[name] * -2 if damage == "weights" else tensors[name][..., :3].contiguous()
        save_file(tensors, path)
    elif damage == "card json":
        card_path.write_text("{")
    elif damage == "card key":
        del card["blend_weight"]
        card_path.write_text(json.dumps(card))
    elif damage == "card format":
        card_path.write_text(json.dumps({**card, "format_version": 99}))
        error = VersionMismatch
    elif damage == "calibration":
        card_path.write_text(json.dumps({**card, "calibration_scale": card["calibration_scale"] * 2}))
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text('{"model": 1}')
    else:
        (folder / "tokenizer.json").unlink()
    with pytest.raises(error, match="folder"):
        LocalReranker.from_folder(folder, world.items())


def test_a_run_without_that_reranker_says_what_to_do(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="double11 distill"):
        LocalReranker.load(run, "7")
    bare = RunDirectory(run.root, {**run.manifest, "rerankers": []})
    with pytest.raises(NotFound, match="double11 distill"):
        LocalReranker.load(bare)


def test_prompts_longer_than_the_model_are_refused(folder: Path, world: ModuleType) -> None:
    for name in ("double11.json", "extras.safetensors", "items.safetensors"):
        (folder / name).unlink()
    with pytest.raises(BadInput, match="prefix_tokens_max"):
        LocalReranker.from_folder(folder, world.items(), config=RerankConfig(prefix_tokens_max=32_000))


def test_a_card_that_asks_for_more_positions_than_there_are_is_refused(folder: Path, world: ModuleType) -> None:
    for name, more in (
        ("config.json", {"max_position_embeddings": 10**12}),
        ("double11.json", {"prefix_tokens_max": 10**6}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    with pytest.raises(BadInput, match="the model's positions"):
        LocalReranker.from_folder(folder, world.items())


def test_known_scores_are_not_computed_again_and_are_the_same(run: RunDirectory) -> None:
    engine, off = (LocalReranker.load(run, config=RerankConfig(score_cache_items_max=n))._engine for n in (1000, 0))
    first, whole = ask(10), ask(30)
    for one in (first, whole):
        one.features[:] = np.arange(len(one.item_ids))[:, None] / 7
    before = engine.score([first], [0.0])[0]
    mixed, again = engine.score([whole], [0.0])[0], engine.score([whole], [0.0])[0]
    fresh = off.score([whole], [0.0])[0]
    assert not isinstance(before, Exception)
    assert mixed.scores[:10].tolist() == before.scores.tolist()
    assert again.scores.tolist() == mixed.scores.tolist()
    assert mixed.scores == pytest.approx(fresh.scores, abs=1e-5)
    assert (len(engine._scores), len(off._scores)) == (30, 0)
    whole.features[3, 1] = 9
    other = engine.score([replace(whole, as_of_us=NOW_US + 10**15)], [0.0])[0]
    changed = engine.score([whole], [0.0])[0]
    assert changed.scores[3] != again.scores[3]
    assert changed.scores[4:].tolist() == again.scores[4:].tolist()
    assert not np.array_equal(other.scores, changed.scores)


def test_the_score_cache_keeps_its_bound_and_nothing_that_is_no_number() -> None:
    cache = ScoreCache(3)
    keys = cache.keys([1, 2], [f"i{n}" for n in range(5)], [""] * 5, np.zeros((5, 2), np.float32))
    assert len(set(keys)) == 5
    cache.put(keys[:3], np.array([1, np.nan, 3], np.float32))
    assert cache.get(keys[:3], 3).tolist() == pytest.approx([1, np.nan, 3], nan_ok=True)
    cache.get(keys[:1], 1)
    cache.put(keys[3:], np.array([4, 5], np.float32))
    assert cache.get(keys, 5).tolist() == pytest.approx([1, np.nan, np.nan, 4, 5], nan_ok=True)
    assert len(cache) == 3
    assert cache.keys([1, 3], ["i0"], [""], np.zeros((1, 2), np.float32)) != keys[:1]
    assert cache.keys([1, 2], ["i"], ["0"], np.zeros((1, 2), np.float32)) != keys[:1]


def test_without_adaptive_depth_a_batch_is_computed_whole(run: RunDirectory) -> None:
    engine = LocalReranker.load(run, config=RerankConfig(adaptive_depth=False))._engine
    result = engine.score([ask(40)], [0.0], 3)[0]
    assert not isinstance(result, Exception)
    assert result.depth == 40
