"""Our forward against transformers with the same weights: MoE and dense, padded and ragged, both dialects."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llm_reranker.attention import PackedCausal, SharedPrefix, _to_prefix
from llm_reranker.checkpoint import read_json, read_model_tensors
from llm_reranker.model import Model, ModelConfig
from recsys.core import BadInput, CorruptData

COMMON = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.3, "max_position_embeddings": 512,
}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
KINDS = {
    "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **MOE, norm_topk_prob=False)),
    "moe-renormalised": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **MOE, norm_topk_prob=True)),
    "moe-some-dense": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, **MOE, norm_topk_prob=True, mlp_only_layers=[1])
    ),
    "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
    "dense-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, tie_word_embeddings=True)),
}


def theirs(kind: str, folder: Path, **save: object) -> torch.nn.Module:
    torch.manual_seed(5)
    model = KINDS[kind]().eval()
    model.save_pretrained(folder, **save)
    return model


def ours(folder: Path) -> Model:
    config = ModelConfig.from_json(read_json(folder / "config.json"), "config.json")
    return Model(config, read_model_tensors(folder, config))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_on_ragged_sequences_and_on_padded_batches(kind: str, tmp_path: Path) -> None:
    reference, model = theirs(kind, tmp_path), ours(tmp_path)
    lengths = [7, 1, 12]
    ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    flat = ids[mask]
    position = (torch.arange(12) * mask)[mask]
    with torch.inference_mode():
        hidden = model.hidden(model.embed(flat), position, PackedCausal(lengths))
        logits = hidden @ model.head_VD.T
        padded = reference(ids, attention_mask=mask.long()).logits[mask]
        ragged = torch.cat([reference(row[None, :n]).logits[0] for row, n in zip(ids, lengths, strict=True)])
    assert (logits - padded).abs().max() <= 1e-4
    assert (logits - ragged).abs().max() <= 1e-4
    assert logits.abs().max() > 0.5  # the comparison is of something


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_shared_prefix_scores_each_candidate_as_if_it_were_alone(kind: str, tmp_path: Path) -> None:
    reference, model = theirs(kind, tmp_path), ours(tmp_path)
    g = torch.Generator().manual_seed(2)
    prefixes = [torch.randint(0, 60, (n,), generator=g) for n in (9, 4)]
    suffixes = [[torch.randint(0, 60, (n,), generator=g) for n in lengths] for lengths in ((3, 1, 5), (2, 2))]
    with torch.inference_mode():
        attention = PackedCausal([9, 4])
        positions = torch.cat([torch.arange(9), torch.arange(4)])
        model.hidden(model.embed(torch.cat(prefixes)), positions, attention)
        flat = torch.cat([s for part in suffixes for s in part])
        at = torch.cat(
            [len(p) + torch.arange(len(s)) for p, part in zip(prefixes, suffixes, strict=True) for s in part]
        )
        shared = SharedPrefix(attention.kept, [[len(s) for s in part] for part in suffixes])
        hidden = model.hidden(model.embed(flat), at, shared)
        alone = [
            reference.model(torch.cat([p, s])[None]).last_hidden_state[0, len(p) :]
            for p, part in zip(prefixes, suffixes, strict=True)
            for s in part
        ]
        silent = PackedCausal([9, 4], states=False)
        assert not len(model.hidden(model.embed(torch.cat(prefixes)), positions, silent))
        last_only = SharedPrefix(silent.kept, [[len(s) for s in part] for part in suffixes], last_only=True)
        last = model.hidden(model.embed(flat), at, last_only)
    assert (hidden - torch.cat(alone)).abs().max() <= 1e-4
    assert (last - torch.stack([a[-1] for a in alone])).abs().max() <= 1e-4


@pytest.mark.parametrize(("tokens", "prefix", "loudness"), [(1100, 200, 1.0), (700, 256, 1.0), (700, 200, 60.0)])
def test_many_tokens_take_from_a_prefix_what_few_do(tokens: int, prefix: int, loudness: float) -> None:
    g = torch.Generator().manual_seed(4)
    q_THd = torch.randn(tokens, 4, 12, generator=g) * loudness
    k_GPd, v_GPd = torch.randn(2, 2, prefix, 12, generator=g)
    many = _to_prefix(q_THd, k_GPd, v_GPd)
    few = [_to_prefix(part, k_GPd, v_GPd) for part in q_THd.split(50)]
    for whole, parts in zip(many, zip(*few, strict=True), strict=True):
        assert torch.allclose(whole, torch.cat(parts), atol=1e-4, rtol=1e-5)


def test_label_direction_is_softmax_over_no_and_yes(tmp_path: Path) -> None:
    reference, model = theirs("moe", tmp_path), ours(tmp_path)
    ids = torch.arange(10)
    with torch.inference_mode():
        logits = reference(ids[None]).logits[0, -1]
        hidden = model.hidden(model.embed(ids), ids, PackedCausal([10]))[-1]
        score = torch.sigmoid(hidden @ model.label_direction(3, 8))
    assert score == pytest.approx(logits[[8, 3]].softmax(-1)[1].item(), abs=1e-5)


def test_positions_that_nobody_asks_for_cost_no_memory(tmp_path: Path) -> None:
    theirs("dense", tmp_path)
    ids, position = torch.arange(9), torch.arange(9)
    few = ours(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(read_json(config) | {"max_position_embeddings": 10**12}))
    many = ours(tmp_path)
    hidden = [m.hidden(m.embed(ids), position, PackedCausal([9])) for m in (few, many)]
    assert torch.equal(*hidden)


def test_older_dialect_reads_the_same(tmp_path: Path) -> None:
    theirs("moe", tmp_path)
    new = read_json(tmp_path / "config.json")
    old = dict(new)
    old["num_experts"] = old.pop("num_local_experts")
    old["rope_theta"] = old.pop("rope_parameters")["rope_theta"]
    assert ModelConfig.from_json(old, "old") == ModelConfig.from_json(new, "new")


@pytest.mark.parametrize("scaling", [None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": 3e5}])
def test_a_rope_that_is_not_scaled_is_that_of_transformers(scaling: dict[str, object] | None, tmp_path: Path) -> None:
    theirs("moe", tmp_path)
    config = read_json(tmp_path / "config.json") | {"rope_scaling": scaling, "rope_theta": 2e5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"]
    assert ModelConfig.from_json(config, "config.json").rope_theta == said


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_folder_of_transformers_4_and_one_of_5_say_what_transformers_says(kind: str, tmp_path: Path) -> None:
    """Of 4: `num_experts`, a top-level `rope_theta` and `torch_dtype`, in bfloat16, one tensor per expert."""
    made = theirs(kind, tmp_path / "v5").to(torch.bfloat16).to(torch.float32)
    made.save_pretrained(tmp_path / "v5")
    reference = type(made).from_pretrained(tmp_path / "v5").eval()  # its RoPE was rounded on the way
    config = read_json(tmp_path / "v5/config.json")
    assert "rope_parameters" in config
    assert ("num_local_experts" in config) == (kind == "moe")
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    config |= {"torch_dtype": "bfloat16", "transformers_version": "4.51.0"}
    config.pop("dtype", None)
    if kind == "moe":
        config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "v4").mkdir()
    (tmp_path / "v4/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "v5/model.safetensors")
    assert (kind == "moe") == ("model.layers.1.mlp.experts.5.down_proj.weight" in tensors)
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, tmp_path / "v4/model.safetensors")
    ids = torch.arange(11)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
        for dialect in ("v4", "v5"):
            model = ours(tmp_path / dialect)
            logits = model.hidden(model.embed(ids), ids, PackedCausal([11])) @ model.head_VD.T
            assert (logits - expected).abs().max() <= 1e-4, dialect


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_saved_again_in_the_same_layout(kind: str, tmp_path: Path) -> None:
    theirs(kind, tmp_path / "one", max_shard_size="20KB")
    config = ModelConfig.from_json(read_json(tmp_path / "one/config.json"), "config.json")
    tensors = read_model_tensors(tmp_path / "one", config)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/config.json").write_text((tmp_path / "one/config.json").read_text())
    save_file(tensors, tmp_path / "two/model.safetensors", metadata={"format": "pt"})
    again = type(KINDS[kind]()).from_pretrained(tmp_path / "two")
    again.save_pretrained(tmp_path / "three", max_shard_size="20KB")
    one, three = (
        {n: t for path in (tmp_path / name).glob("*.safetensors") for n, t in load_file(path).items()}
        for name in ("one", "three")
    )
    assert one.keys() == three.keys()
    assert all(torch.equal(one[n], three[n]) for n in one)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        p.name for p in (tmp_path / "three").iterdir()
    )


def test_sharded_checkpoint_reads_the_same(tmp_path: Path) -> None:
    theirs("moe", tmp_path / "one")
    theirs("moe", tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many/model.safetensors.index.json").is_file()
    assert torch.equal(ours(tmp_path / "one").embed_VD, ours(tmp_path / "many").embed_VD)
    shutil.copy(tmp_path / "one/model.safetensors", tmp_path / "many")  # transformers then takes this one
    for shard in (tmp_path / "many").glob("model-*.safetensors"):
        shard.unlink()
    assert torch.equal(ours(tmp_path / "one").embed_VD, ours(tmp_path / "many").embed_VD)


@pytest.mark.parametrize("damage", ["a shard is gone", "a shard is short", "the index lies", "the index is none"])
def test_a_damaged_set_of_shards_is_a_clear_error(damage: str, tmp_path: Path) -> None:
    theirs("moe", tmp_path, max_shard_size="20KB")
    index, shards = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("*.safetensors"))
    said = read_json(index)
    if damage == "a shard is gone":
        shards[1].unlink()
    elif damage == "a shard is short":
        shards[1].write_bytes(shards[1].read_bytes()[:-5])
    elif damage == "the index lies":
        said["weight_map"] = dict.fromkeys(said["weight_map"], shards[0].name)
        index.write_text(json.dumps(said))
    else:
        index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CorruptData, match="safetensors"):
        ours(tmp_path)


@pytest.mark.parametrize("key", ["head_dim", "norm_topk_prob", "num_local_experts", "rope_parameters", "rms_norm_eps"])
def test_a_missing_key_is_an_error_never_a_default(key: str, tmp_path: Path) -> None:
    theirs("moe", tmp_path)
    config = read_json(tmp_path / "config.json")
    del config[key]
    with pytest.raises(CorruptData, match="no "):
        ModelConfig.from_json(config, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "llama"), ("attention_bias", True), ("use_sliding_window", True), ("hidden_act", "gelu"),
     ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
     ("rope_scaling", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),  # as model cards say to add it
     ("rope_scaling", {"type": "linear", "rope_theta": 1e4, "factor": 4.0})],
)  # fmt: skip
def test_an_architecture_we_do_not_have_is_refused(key: str, value: object, tmp_path: Path) -> None:
    theirs("moe", tmp_path)
    with pytest.raises(CorruptData, match=key):
        ModelConfig.from_json({**read_json(tmp_path / "config.json"), key: value}, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "32"), ("num_hidden_layers", 0), ("head_dim", None), ("head_dim", 11), ("num_key_value_heads", 3),
     ("num_experts_per_tok", 7), ("rms_norm_eps", 0), ("norm_topk_prob", "yes"), ("vocab_size", True),
     ("num_experts", 5), ("decoder_sparse_step", 0), ("rope_parameters", 1e4),
     ("rope_parameters", {"rope_type": "default", "rope_theta": "1e4"}),
     ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})],
)  # fmt: skip
def test_a_value_that_no_checkpoint_can_have_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    theirs("moe", tmp_path)
    with pytest.raises(CorruptData, match=key if key != "rope_parameters" else "rope_"):
        ModelConfig.from_json({**read_json(tmp_path / "config.json"), key: value}, "config.json")


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "integers", "NaN", "truncated", "no file"])
def test_damaged_tensors_are_a_clear_error(damage: str, tmp_path: Path) -> None:
    theirs("moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["model.layers.9.stray"] = torch.zeros(2)
    elif damage == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif damage == "integers":  # quantised by another tool
        tensors[name] = tensors[name].to(torch.int8)
    elif damage == "NaN":  # of a training that went astray
        tensors[name][0, 0] = torch.nan
    save_file(tensors, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "no file":
        path.unlink()
    with pytest.raises(CorruptData, match=r"model\.safetensors"):
        ours(tmp_path)


def test_weights_of_another_user_are_not_called_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    theirs("moe", tmp_path)
    config = ModelConfig.from_json(read_json(tmp_path / "config.json"), "config.json")
    monkeypatch.setattr(Path, "open", refused)  # modes do not hold root back
    with pytest.raises(BadInput, match=r"model\.safetensors: got Permission denied"):
        read_model_tensors(tmp_path, config)


def test_config_that_is_not_json_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(CorruptData, match=r"config\.json"):
        ours(tmp_path)
