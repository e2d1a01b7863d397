"""What distillation leaves behind: a folder transformers loads unchanged, a report, the same bytes for a seed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from llm_reranker import fit
from llm_reranker.ablation import VARIANTS
from llm_reranker.attention import PackedCausal
from llm_reranker.checkpoint import read
from llm_reranker.config import DistillConfig
from llm_reranker.distill import distill
from llm_reranker.encoded import align
from llm_reranker.lists import Lists
from llm_reranker.lists import read as read_lists
from llm_reranker.local import LocalReranker
from llm_reranker.teachers import Judgement, local
from llm_reranker.upcycle import upcycle
from recsys.core import BadInput
from recsys.core.run_dir import RunDirectory


def test_the_folder_loads_in_transformers_unchanged(run: RunDirectory) -> None:
    folder = run.root / "reranker/1"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours = read(folder)
    ids = torch.tensor(ours.tokenizer.encode("red tea cup <|im_end|>").ids)
    assert tokenizer("red tea cup <|im_end|>")["input_ids"] == ids.tolist()
    with torch.inference_mode():
        hidden = ours.model.hidden(ours.model.embed(ids), torch.arange(len(ids)), PackedCausal([len(ids)]))
        assert (theirs(ids[None]).logits[0] - hidden @ ours.model.head_VD.T).abs().max() <= 1e-4


def test_the_report_says_what_happened(run: RunDirectory) -> None:
    card = json.loads(run.path("reranker/1/double11.json").read_text())
    report = card["report"]
    assert set(report["ndcg@10"]) == {"rank", "teacher", "student", "blended"}
    assert report["ndcg@10"]["blended"] >= report["ndcg@10"]["rank"]
    assert 0 <= card["blend_weight"] <= 1
    assert report["queries"]["train"] > 100 > report["queries"]["validation"] > 20
    assert report["tasks"]["all"]["ndcg@10"] == report["ndcg@10"]
    for weight, task in ((card["blend_weight"], "all"), (card["blend_weight_new_only"], "new-only")):
        said = report["tasks"][task]
        assert (weight > 0) == (said["student_gain"]["diff"] > 0)
        assert said["ndcg@10"]["blended"] >= said["ndcg@10"]["rank"]
        assert report["teacher"]["beats_rank"][task] == said["teacher_gain"]["sure"]
    assert sum(report["expert_usage"][0]) == pytest.approx(1, abs=1e-2)
    assert 0 <= report["ece"]["calibrated"] < 0.2


def test_the_default_teacher_has_four_times_the_active_parameters() -> None:
    c = DistillConfig()

    def active(hidden: int, layers: int, width: int) -> int:
        return layers * (3 * hidden * hidden + c.experts_per_token * 3 * hidden * width)

    student = active(c.hidden_size, c.num_layers, c.expert_width)
    assert active(c.teacher_hidden_size, c.teacher_layers, c.teacher_expert_width) >= 4 * student


def test_every_item_of_the_catalogue_has_its_soft_token(run: RunDirectory, world: ModuleType) -> None:
    loaded = read(run.root / "reranker/1")
    assert loaded.items is not None
    assert loaded.items.soft_MSD.shape == (160, 1, world.TINY.hidden_size)
    assert (loaded.items.rows(world.items().item_key) >= 0).all()
    assert loaded.items.rows(np.array([5]))[0] == -1


def test_the_same_seed_gives_the_same_folder(world: ModuleType, tmp_path: Path) -> None:
    config = dataclasses.replace(world.TINY, train_queries_max=24, validation_queries_max=8, student_epochs=1)
    lists = world.write_lists(tmp_path / "l.parquet", queries=60)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(ord(name))  # the caller's generator plays no part
        distill(lists, world.items(), tmp_path / name, seed=seed, config=config)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)
    assert (tmp_path / "a/double11.json").read_text() == (tmp_path / "b/double11.json").read_text()


def test_bad_requests_are_refused_before_any_training(world: ModuleType, tmp_path: Path) -> None:
    lists = world.write_lists(tmp_path / "l.parquet", queries=12)
    with pytest.raises(BadInput, match="--teacher"):
        distill(lists, world.items(), tmp_path / "o", teacher="gpt-99")
    with pytest.raises(BadInput, match="width 5"):
        distill(lists, world.items(), tmp_path / "o", item_vectors=(np.array([1]), np.zeros((1, 5), np.float32)))
    table = pq.read_table(lists)
    one_time = table.set_column(1, "query_time", [[5] * len(table)])
    pq.write_table(one_time, tmp_path / "one.parquet")
    with pytest.raises(BadInput, match="two windows"):
        distill(tmp_path / "one.parquet", world.items(), tmp_path / "o")
    with pytest.raises(BadInput, match="hidden_size"):
        DistillConfig(hidden_size=100)
    for sizes in ({"num_experts": 0}, {"num_experts": 7, "experts_per_token": 2}):
        with pytest.raises(BadInput, match="upcycle_epochs"):
            DistillConfig(upcycle_epochs=1, **sizes)


def test_align_undoes_each_windows_rotation() -> None:
    rng = np.random.default_rng(0)
    vectors, key = rng.normal(size=(50, 6)).astype(np.float32), np.arange(50)
    turns = [np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(2)]
    item = rng.integers(0, 60, 200)  # items 50 to 59 are not in the reference
    block = np.repeat([0, 1], 100)
    known = np.concatenate([vectors, rng.normal(size=(10, 6)).astype(np.float32)])
    window = np.stack([known[i] @ turns[b] for i, b in zip(item, block, strict=True)]).astype(np.float32)
    window[7] = np.nan
    aligned = align(window, block, item, (key, vectors))
    assert np.isnan(aligned[7]).all()
    assert np.delete(aligned, 7, 0) == pytest.approx(np.delete(known[item], 7, 0), abs=1e-4)


def test_where_the_ranker_knows_all_its_order_stands(world: ModuleType, tmp_path: Path) -> None:
    config = dataclasses.replace(world.TINY, train_queries_max=32, student_epochs=1)
    lists = world.write_lists(tmp_path / "l.parquet", queries=240, taste=0.0)
    report = distill(lists, world.items(), tmp_path / "o", config=config)
    assert report["teacher"]["beats_rank"] == {"all": False, "new-only": False}
    for said in report["tasks"].values():
        assert said["weight"] == 0
        assert said["ndcg@10"]["blended"] == said["ndcg@10"]["rank"]


class Whisperer:
    """Knows the shoppers' taste, mumbles, and has never heard of the ranker. A Teacher."""

    name, fitted, facts = "whisperer", False, {"name": "whisperer"}

    def label(
        self, lists: Lists, queries: Sequence[int], rows: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[int, Judgement]]:
        for at, (query, part) in enumerate(zip(queries, rows, strict=True)):
            rng, likes = np.random.default_rng(query), lists.history_text[query].split("| ")[1].split("\n")[0]
            said = [100 * (likes in lists.item_text[r]) + 45 * rng.normal() for r in part]
            said[0] = math.nan if at % 7 == 3 else said[0]
            yield at, Judgement(log_odds=np.array(said, np.float32))


def test_a_teacher_who_is_worse_alone_is_believed_for_what_it_adds_to_the_ranker(
    world: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LocalTeacher", lambda *_: Whisperer())
    taught: list[fit.Chosen] = []
    train = fit.train

    def noted(model: object, data: object, chosen: Sequence[fit.Chosen], *more: object, **named: object) -> float:
        taught.extend(chosen)
        return train(model, data, chosen, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(fit, "train", noted)
    config = dataclasses.replace(world.TINY, student_epochs=1, student_steps_min=1)
    path = world.write_lists(tmp_path / "l.parquet", queries=400, taste=2.0)
    report = distill(path, world.items(), tmp_path / "o", config=config, teacher="hf:whisperer")
    said = report["tasks"]["all"]
    assert said["ndcg@10"]["teacher"] < said["ndcg@10"]["rank"]
    assert report["teacher"]["beats_rank"]["all"]
    assert 0 < said["teacher_weight"] < 1
    assert said["teacher_gain"]["diff"] > 0
    # What the student is taught is what the two say together, on the scale of what shoppers did; silence stays silence.
    lists, soft = read_lists(path), [c for c in taught if c.teacher is not None]
    label = np.concatenate([lists.label[c.rows] for c in soft])
    log_odds = np.concatenate([c.teacher for c in soft])
    known = np.isfinite(log_odds)
    assert 0.99 < known.mean() < 1
    p = 1 / (1 + np.exp(-log_odds[known]))
    assert p.mean() == pytest.approx(label[known].mean(), abs=0.01)
    rank = np.concatenate([lists.rank_score[c.rows] for c in soft])[known]
    assert np.corrcoef(log_odds[known], label[known])[0, 1] > np.corrcoef(rank, label[known])[0, 1] + 0.02


def test_kept_labels_spare_the_teacher_its_training_and_give_the_same_student(
    world: ModuleType, tmp_path: Path
) -> None:
    config = dataclasses.replace(world.TINY, train_queries_max=64, student_epochs=1)
    lists = world.write_lists(tmp_path / "l.parquet", queries=160)
    first, again = (
        distill(lists, world.items(), tmp_path / name, config=config, labels=tmp_path / "labels") for name in "ab"
    )
    assert "loss" in first["teacher"]
    assert "loss" not in again["teacher"]
    assert (again["teacher"]["lists"]["made"], first["tasks"]) == (0, again["tasks"])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_ablation_has_every_row(world: ModuleType, tmp_path: Path) -> None:
    config = dataclasses.replace(world.TINY, train_queries_max=16, validation_queries_max=8, student_epochs=1)
    lists = world.write_lists(tmp_path / "l.parquet", queries=40)
    report = distill(lists, world.items(), tmp_path / "o", config=config, ablate=True)
    rows = {row["what"]: row for row in report["ablation"]}
    assert list(rows) == ["rank", "teacher", "student", *VARIANTS]
    assert rows["student"]["all"]["ndcg@10"] == report["tasks"]["all"]["ndcg@10"]["student"]
    assert rows["rank"]["all"]["over_rank"] == [0, 0, 0]
    assert rows["1 token"] == {**rows["student"], "what": "1 token"}
    assert rows["4 tokens"]["parameters"] > rows["2 tokens"]["parameters"] > rows["student"]["parameters"]


@pytest.mark.parametrize(("student", "absent"), [({"num_experts": 0}, {"upcycled"}), ({"upcycle_epochs": 1}, set())])
def test_every_student_has_its_ablation(
    student: dict[str, int], absent: set[str], world: ModuleType, tmp_path: Path
) -> None:
    few = {"train_queries_max": 8, "validation_queries_max": 4, "student_epochs": 1, "student_steps_min": 1}
    config = dataclasses.replace(world.TINY, **few, **student)
    lists = world.write_lists(tmp_path / "l.parquet", queries=40)
    report = distill(lists, world.items(), tmp_path / "o", config=config, ablate=True)
    rows = {row["what"]: row for row in report["ablation"]}
    assert VARIANTS.keys() - rows.keys() == absent
    assert rows["dense"]["parameters"] <= rows["student"]["parameters"]


def test_a_dense_student_has_the_active_parameters_of_the_experts_and_serves(world: ModuleType, tmp_path: Path) -> None:
    config = dataclasses.replace(world.TINY, train_queries_max=16, validation_queries_max=8, student_epochs=1)
    lists = world.write_lists(tmp_path / "l.parquet", queries=40)
    dense = dataclasses.replace(config, num_experts=0)
    sizes = []
    for name, c in (("moe", config), ("dense", dense)):
        report = distill(lists, world.items(), tmp_path / name, config=c)
        sizes.append(report["active_parameters"]["student"])
        LocalReranker.from_folder(tmp_path / name, world.items()).close()  # gives transformers' known answer
    assert sizes[0] - sizes[1] == config.num_layers * config.hidden_size * config.num_experts  # the router
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval(), read(tmp_path / "dense")
    ids = torch.arange(9)
    with torch.inference_mode():
        hidden = ours.model.hidden(ours.model.embed(ids), ids, PackedCausal([9]))
        assert (theirs(ids[None]).logits[0] - hidden @ ours.model.head_VD.T).abs().max() <= 1e-4


@pytest.mark.parametrize(("experts", "per_token"), [(4, 2), (6, 3), (4, 1)])
def test_upcycled_experts_say_what_the_dense_network_said(experts: int, per_token: int) -> None:
    common = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    dense = Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=per_token * 8)).eval()
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **common, num_experts=experts, num_experts_per_tok=per_token, moe_intermediate_size=8, norm_topk_prob=True
        )
    ).eval()
    ids = torch.randint(0, 50, (2, 11))
    with torch.inference_mode():
        assert (moe(ids).logits - dense(ids).logits).abs().max() > 0.1
        upcycle(dense, moe)
        assert (moe(ids).logits - dense(ids).logits).abs().max() <= 1e-4
    with pytest.raises(BadInput, match="upcycling"):
        upcycle(Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=per_token * 8 + 2)), moe)
