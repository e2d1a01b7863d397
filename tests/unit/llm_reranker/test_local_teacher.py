"""A Qwen3 folder as teacher: Qwen3-Reranker's prompt, and transformers' own log-odds of yes against no."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from qwen3_world import KINDS, write_folder

from llm_reranker.config import RerankConfig
from llm_reranker.lists import read
from llm_reranker.teachers.local import LocalTeacher
from recsys.core import CorruptData, NotFound

PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Judge whether the shopper will choose the item next.\n"
    "<Query>: {history}\n<Document>: {item}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_what_transformers_says_to_the_published_prompt(
    kind: str, world: ModuleType, tmp_path: Path
) -> None:
    reference = write_folder(kind, tmp_path / "model", ["red tea cup", PROMPT])
    teacher = LocalTeacher(tmp_path / "model", RerankConfig(prefix_tokens_max=1500, item_tokens_max=200))
    lists = read(world.write_lists(tmp_path / "l.parquet", queries=8, candidates=5))
    queries = [3, 1]
    said = dict(teacher.label(lists, queries, [lists.rows(q) for q in queries]))
    tokenizer = teacher._loaded.tokenizer
    yes, no = tokenizer.token_to_id("yes"), tokenizer.token_to_id("no")
    for at, q in enumerate(queries):
        for row, ours in zip(lists.rows(q), said[at].log_odds, strict=True):
            parts = PROMPT.format(history=lists.history_text[q], item="\0").split("\0")
            ids = [i for text in (parts[0], lists.item_text[row], parts[1])
                   for i in tokenizer.encode(text, add_special_tokens=False).ids]  # fmt: skip
            with torch.inference_mode():
                logits = reference(torch.tensor([ids])).logits[0, -1]
            assert float(logits[yes] - logits[no]) == pytest.approx(float(ours), abs=1e-4)
    assert teacher.facts["active_parameters"] > 10_000
    assert np.ptp(said[0].log_odds) > 0.01


def test_other_weights_in_a_folder_of_the_same_name_are_another_teacher(tmp_path: Path) -> None:
    names = []
    for day in ("monday", "friday", "saturday"):
        model = write_folder("dense", tmp_path / day / "final", ["red tea cup", PROMPT])
        if day == "friday":
            for parameter in model.parameters():
                parameter.data.mul_(1.5)
            model.save_pretrained(tmp_path / day / "final")
        names.append(LocalTeacher(tmp_path / day / "final", RerankConfig()).name)
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("hf:final:") for name in names)


def test_no_folder_and_a_broken_one_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="hf"):
        LocalTeacher(tmp_path / "none", RerankConfig())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptData, match="config"):
        LocalTeacher(tmp_path, RerankConfig())
