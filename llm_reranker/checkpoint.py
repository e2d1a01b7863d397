"""A reranker's folder, in Hugging Face layout plus what Qwen3 has no place for. Heavy: torch, tokenizers.

    config.json  model.safetensors (or sharded with model.safetensors.index.json)  tokenizer.json
    double11.json         the card: feature names, blend weight, calibration, limits, known answer, report
    extras.safetensors    item encoder, feature projections (llm_reranker.extras)
    items.safetensors     item_key [M], soft [M, S, D]: the catalogue's soft tokens

Without extras the folder scores in text mode. Missing, extra, mis-shaped and infinite tensors are errors.
Shape legend: M items, S soft tokens per item, D hidden.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from llm_reranker.extras import Extras
from llm_reranker.linear import Precision
from llm_reranker.model import Model, ModelConfig
from llm_reranker.prompt import CONTROL_TOKENS
from recsys.core import disk
from recsys.core.errors import CorruptData, Unavailable, VersionMismatch
from recsys.core.ids import find_rows
from recsys.core.run_dir import permitted

CARD_FORMAT = 2
_FIX = "Take the folder whole, or distil again."


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """double11.json. calibration: log-odds = scale x raw + bias. known_answer: a request and its scores.

    blend_weight: of task all.
    """

    version: str
    feature_names: tuple[str, ...]
    soft_tokens: int
    embedding_dim: int
    prefix_tokens_max: int
    item_tokens_max: int
    calibration_scale: float
    calibration_bias: float
    blend_weight: float
    blend_weight_new_only: float
    known_answer: Mapping[str, Any]
    report: Mapping[str, Any]
    format_version: int = CARD_FORMAT

    @classmethod
    def read(cls, path: Path) -> Card:
        """Read double11.json. Raises: CorruptData for bad JSON or keys; VersionMismatch for another format."""
        values = read_json(path)
        if values.get("format_version") != CARD_FORMAT:
            came = values.get("format_version")
            raise VersionMismatch(str(path), came=came, expected=f"format_version {CARD_FORMAT}", fix="Distil again.")
        names = {f.name for f in dataclasses.fields(cls)}
        if set(values) != names:
            raise CorruptData(str(path), came=sorted(set(values) ^ names), expected=f"{sorted(names)}", fix=_FIX)
        return cls(**{**values, "feature_names": tuple(values["feature_names"])})

    def write(self, path: Path) -> None:
        """Write double11.json."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True), "utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftItems:
    """Soft tokens of the catalogue, sorted by key. item_key: int64 [M]; soft: float32 [M, S, D]."""

    item_key: npt.NDArray[np.int64]
    soft_MSD: Tensor

    def rows(self, item_key: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each key; -1 for an item without soft tokens."""
        return find_rows(self.item_key, item_key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything a scorer needs. card, extras and items are None for a plain Hugging Face folder."""

    model: Model
    tokenizer: Tokenizer
    yes: int
    no: int
    card: Card | None
    extras: Extras | None
    items: SoftItems | None


def read(
    folder: Path,
    *,
    has: Callable[[str], bool] | None = None,
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Read a folder. has: which file names count (a run counts only what its manifest lists; default: what is there).

    precision: of the model's products; files are float32 or narrower floats. device: where model and extras are; the
    items' soft tokens stay in the host's memory.

    Raises: CorruptData for missing files or keys, and missing, extra or mis-shaped tensors; VersionMismatch; BadInput
    for a file that this user may not read; Unavailable where this machine has no such device.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Unavailable(
            "[llm_reranker] device", came=f"{device}, torch {torch.__version__}", expected="a CUDA device",
            fix="Set it to cpu, or install the CUDA build where a GPU is: make setup VARIANT=cuda.",
        )  # fmt: skip
    has = has or (lambda name: (folder / name).is_file())
    config = ModelConfig.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = read_model_tensors(folder, config, torch.bfloat16 if precision == "bf16" else torch.float32)
    model = Model(config, {name: tensors.pop(name).to(device) for name in list(tensors)}, precision)
    tokenizer = read_tokenizer(folder / "tokenizer.json", config.vocab_size)
    card, extras, items = None, None, None
    if has("double11.json"):
        card = Card.read(folder / "double11.json")
    if card is not None and card.soft_tokens and has("extras.safetensors"):
        extras = Extras(config.hidden_size, card.feature_names, card.embedding_dim, card.soft_tokens)
        shapes = {n: tuple(t.shape) for n, t in extras.state_dict().items()}
        extras.load_state_dict(_tensors([folder / "extras.safetensors"], shapes))
        extras.eval().requires_grad_(False).to(device)
        if has("items.safetensors"):
            items = read_items(folder / "items.safetensors", card.soft_tokens, config.hidden_size)
    elif card is not None and card.soft_tokens:
        card = None  # of soft tokens that are not there
    yes, no = (label_token(tokenizer, word, folder) for word in ("yes", "no"))
    return Checkpoint(model=model, tokenizer=tokenizer, yes=yes, no=no, card=card, extras=extras, items=items)


def weight_files(folder: Path) -> list[Path]:
    """The file of the model's tensors, else the shards that the index names. Raises: CorruptData for the index."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.is_file() and not files[0].is_file():  # as transformers looks for them
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CorruptData(str(index), came="no weight_map", expected="tensor names and their files", fix=_FIX)
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    return files


def read_model_tensors(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of `config.shapes()`, of all weight files.

    Raises: CorruptData.
    """
    # A tied checkpoint may carry a copy of the embedding as its head.
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return _tensors(weight_files(folder), config.shapes(), optional, dtype)


def read_items(path: Path, soft_tokens: int, hidden: int) -> SoftItems:
    """Read items.safetensors. Raises: CorruptData."""
    tensors = _open([path])
    keys, soft = tensors.get("item_key"), tensors.get("soft")
    if keys is None or soft is None or keys.dim() != 1 or soft.shape != (len(keys), soft_tokens, hidden):
        came = {n: tuple(t.shape) for n, t in tensors.items()}
        raise CorruptData(str(path), came=came, expected=f"item_key [M], soft [M, {soft_tokens}, {hidden}]", fix=_FIX)
    return SoftItems(item_key=keys.numpy(), soft_MSD=soft.float())


def write_items(path: Path, item_key: npt.NDArray[np.int64], soft_MSD: Tensor) -> None:
    """Write items.safetensors, rows sorted by key."""
    order = np.argsort(item_key, kind="stable")
    rows = {"item_key": torch.from_numpy(item_key[order]), "soft": soft_MSD[torch.from_numpy(order)].contiguous()}
    with disk.writing(path):
        save_file(rows, path)


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read tokenizer.json. Raises: CorruptData for a bad file, a missing control token or ids beyond the embedding."""
    if not path.is_file():
        raise CorruptData(str(path), came="no such file", expected="a tokenizer", fix=_FIX)
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # the Rust library raises nothing narrower
        raise CorruptData(str(path), came=error, expected="a `tokenizers` file", fix=_FIX) from error
    missing = [t for t in CONTROL_TOKENS[1:] if tokenizer.token_to_id(t) is None]
    highest = max(tokenizer.get_vocab().values(), default=0)  # there may be gaps
    if missing or highest >= vocab_size:
        came = f"ids up to {highest}, without {missing}"
        raise CorruptData(str(path), came=came, expected=f"ids below {vocab_size}, with {CONTROL_TOKENS}", fix=_FIX)
    # What a trainer left switched on when it saved the file; the prompt has bounds of its own.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE as Qwen's, trained on the texts; `yes` and `no` are one token each. Deterministic."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    labels = ["yes no"] * (10 + sum(len(t) for t in texts) // 4)  # outnumber every pair: merged first
    tokenizer.train_from_iterator([*texts, *labels], trainer)
    return tokenizer


def label_token(tokenizer: Tokenizer, word: str, folder: Path) -> int:
    """Id of "yes" or "no" as one token. Raises: CorruptData."""
    id_ = tokenizer.token_to_id(word)
    if id_ is None:
        raise CorruptData(f"{folder}, tokenizer.json", came=f"no token {word!r}", expected="yes and no", fix=_FIX)
    return int(id_)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: CorruptData; BadInput for a file that this user may not read."""
    try:
        with permitted(path, path.parent):
            values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptData(str(path), came=error, expected="a JSON object", fix=_FIX) from error
    if not isinstance(values, dict):
        raise CorruptData(str(path), came=type(values).__name__, expected="a JSON object", fix=_FIX)
    return values


def _tensors(
    files: Sequence[Path],
    shapes: Mapping[str, tuple[int, ...]],
    optional: set[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    tensors = _open(files)
    names, expected = set(tensors) - (optional or set()), set(shapes)
    where = ", ".join(map(str, files))
    for problem, found in (("missing", expected - names), ("extra", names - expected)):
        if found:
            came = f"{len(found)} {problem} tensors, e.g. {min(found)}"
            raise CorruptData(where, came=came, expected=f"{len(expected)} tensors as config.json says", fix=_FIX)
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape or not tensors[name].is_floating_point():
            came = f"{tuple(tensors[name].shape)} of {tensors[name].dtype}"
            raise CorruptData(f"{where}, {name}", came=came, expected=f"{shape} of floats", fix=_FIX)
    made = {name: tensors.pop(name).to(dtype) for name in shapes}  # never both whole copies in memory
    for name, tensor in made.items():
        if not tensor.isfinite().all():
            raise CorruptData(f"{where}, {name}", came="NaN or infinite weights", expected="finite ones", fix=_FIX)
    return made


def _open(files: Sequence[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with permitted(path, path.parent):
                path.open("rb").close()  # safetensors would say that there is no such file
            with safe_open(path, framework="pt") as f:
                tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 not a mapping
        except (SafetensorError, OSError) as error:
            raise CorruptData(str(path), came=error, expected="a whole safetensors file", fix=_FIX) from error
    return tensors
