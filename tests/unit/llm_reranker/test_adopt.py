"""A Qwen3 folder taken as the reranker: copied, judged, given a card, served."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from qwen3_world import write_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_reranker.adopt import adopt
from llm_reranker.base import RerankRequest
from llm_reranker.checkpoint import read
from llm_reranker.config import RerankConfig
from llm_reranker.local import LocalReranker
from recsys.cli.main import run as double11
from recsys.core import CorruptData, Deadline
from recsys.core.run_dir import RunDirectory


@pytest.mark.parametrize(("kind", "save"), [("dense", {}), ("moe", {"max_shard_size": "30KB"})])
async def test_one_command_swaps_in_a_folder(
    kind: str, save: dict[str, str], world: ModuleType, run: RunDirectory, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, lists = tmp_path / "Qwen3-Small", world.write_lists(tmp_path / "l.parquet", queries=24, candidates=6)
    write_folder(kind, folder, ["red tea cup", "yes no"], **save)
    copy = shutil.copytree(run.root, tmp_path / "run")
    (tmp_path / "double11.toml").write_text("[llm_reranker]\nprefix_tokens_max = 600\n")
    argv = ["distill", ".", "--run", str(copy), "--lists", str(lists), "--checkpoint", str(folder), "--replace"]
    assert double11([*argv, "--config", str(tmp_path / "double11.toml")]) == 0
    said = capsys.readouterr().out
    assert "reranker 2" in said
    assert "all: blend weight" in said
    has_none = [f"{task}: blend weight 0.0" in said for task in ("all", "new-only")]
    assert ("serve --no-reranker" in said) == all(has_none)
    swapped = RunDirectory.open(copy)
    assert swapped.reranker_versions() == ["1", "2"]
    reranker = LocalReranker.load(swapped)  # gives the known answer
    assert (reranker.version, reranker.feature_names) == ("2", ())
    request = RerankRequest(
        request_id="r", as_of_us=1, history=[], item_ids=["item-1", "item-2"], texts=["", ""],
        features=np.empty((2, 0), np.float32),
    )  # fmt: skip
    result = await reranker.rerank(request, Deadline.never())
    reranker.close()
    assert (result.depth, np.isfinite(result.scores).all()) == (2, True)
    assert read(copy / "reranker/2").card.prefix_tokens_max == 600
    theirs = AutoModelForCausalLM.from_pretrained(copy / "reranker/2")  # the folder is still theirs
    assert theirs.config.model_type == {"dense": "qwen3", "moe": "qwen3_moe"}[kind]
    shards = list((copy / "reranker/2").glob("model*.safetensors"))
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in shards)
    assert len(shards) == len(list(folder.glob("*.safetensors"))) >= (2 if save else 1)
    assert load_file(shards[0])


def test_shards_are_those_that_the_index_names(world: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder("moe", folder, ["tea lamp shoe red"] * 20, max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"weights-'))
    for shard in folder.glob("model-*.safetensors"):
        shard.rename(shard.with_name(shard.name.replace("model-", "weights-")))
    (folder / "model_of_another.safetensors").write_bytes(b"")
    lists, out = world.write_lists(tmp_path / "l.parquet", queries=24, candidates=6), tmp_path / "o"
    adopt(folder, lists, world.items(), out, serving=RerankConfig(prefix_tokens_max=400))
    assert [p.name for p in sorted(out.glob("*.safetensors"))] == [p.name for p in sorted(folder.glob("weights-*"))]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_folder_is_judged_and_probed_in_the_precision_that_serves(
    kind: str, world: ModuleType, tmp_path: Path
) -> None:
    """Near ties of random weights, whose eight bits are far from their float32."""
    write_folder(kind, tmp_path / "model", ["tea lamp shoe red"] * 20)
    lists, out, int8 = world.write_lists(tmp_path / "l.parquet", queries=40, candidates=6), tmp_path / "o", "int8"
    serving = RerankConfig(precision=int8, prefix_tokens_max=400)
    assert adopt(tmp_path / "model", lists, world.items(), out, serving=serving)["precision"] == int8
    LocalReranker.from_folder(out, world.items(), config=serving).close()


def test_a_card_of_soft_tokens_without_them_is_text_mode_and_a_damaged_one_is_refused(
    run: RunDirectory, tmp_path: Path
) -> None:
    folder = shutil.copytree(run.root / "reranker/1", tmp_path / "a")
    (folder / "extras.safetensors").unlink()
    assert read(folder).card is None
    (folder / "double11.json").write_text("{}")
    with pytest.raises(Exception, match="double11"):
        read(folder)
    (folder / "double11.json").unlink()
    assert read(folder).extras is None
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CorruptData, match="tokenizer"):
        read(folder)
