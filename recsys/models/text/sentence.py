"""A folder in sentence-transformers layout as encoder: a transformer, a pooling, often a normalisation.

    modules.json                 which modules, in which order
    config.json, model*.safetensors, tokenizer files      the transformer, in Hugging Face layout; never unpickled
    1_Pooling/config.json        mean, first (cls) or last token
    sentence_bert_config.json    optional: max_seq_length
    config_sentence_transformers.json    optional: a prompt that goes before every text

Shape legend: N texts of a batch, L tokens of the longest, D hidden, T width of a text vector (= D).
Source: https://sbert.net/docs/package_reference/sentence_transformer/models.html; Reimers and Gurevych 2019.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from recsys.core import CorruptData, NotFound, VersionMismatch
from recsys.core.run_dir import sha256_file

MODULES = "modules.json"
_BATCH_TEXTS = 64
_TOKENS_MAX = 512  # where a folder sets no bound, or a greater one
_POOLINGS = ("mean", "cls", "lasttoken")
_FILES = (
    MODULES, "config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip


class SentenceEncoder:
    """Implements TextEncoder with somebody's trained model. Texts beyond its length are cut."""

    keeps = True

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises: NotFound for no folder, VersionMismatch for another layout, CorruptData for broken files."""
        from transformers import AutoModel, AutoTokenizer  # 2 s and 200 MB that no other encoder needs
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading: a second, and our own bars say what is long
        self._folder, self._device = folder, torch.device(device)
        self._files = _files(folder)
        self._pooling = _pooling(folder)
        self.version = _version(folder, self._files)
        said = _json(folder / "config_sentence_transformers.json", optional=True)
        self._before = (said.get("prompts") or {}).get(said.get("default_prompt_name"), "")
        tokens = _json(folder / "sentence_bert_config.json", optional=True).get("max_seq_length") or _TOKENS_MAX
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _corrupt(
                folder, f"{error!s:.300}", "a transformer and a tokenizer that transformers loads"
            ) from error
        room = getattr(self._model.config, "max_position_embeddings", _TOKENS_MAX)
        self._tokens_max = min(int(tokens), int(self._tokenizer.model_max_length), int(room), _TOKENS_MAX)
        self._tokenizer.padding_side = "right"
        self._model.eval().requires_grad_(False).to(self._device)

    @property
    def dim(self) -> int:
        """T."""
        return int(self._model.config.hidden_size)

    def save(self, folder: Path) -> None:
        """Copy the files that count."""
        for name in self._files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._folder / name, folder / name)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors [N, T] of length 1; similar lengths are computed together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for start in range(0, len(order), _BATCH_TEXTS):
            some = order[start : start + _BATCH_TEXTS]
            vectors[some] = self._encode([self._before + texts[i] for i in some])
        return vectors

    def _encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._tokens_max, return_tensors="pt"
        ).to(self._device)
        hidden_NLD = self._model(**batch).last_hidden_state
        pooled_NT = _pooled(hidden_NLD, batch["attention_mask"], self._pooling)
        vectors: npt.NDArray[np.float32] = F.normalize(pooled_NT, dim=1).cpu().numpy()
        return vectors


def version(folder: Path) -> str:
    """Changes with any file of the folder that counts. Raises: as SentenceEncoder."""
    return _version(folder, _files(folder))


def _pooled(hidden_NLD: Tensor, mask_NL: Tensor, pooling: str) -> Tensor:
    if pooling == "cls":
        return hidden_NLD[:, 0]
    if pooling == "lasttoken":
        return hidden_NLD[torch.arange(len(mask_NL)), mask_NL.sum(1) - 1]
    weight_NL1 = mask_NL[:, :, None].to(hidden_NLD.dtype)
    return (hidden_NLD * weight_NL1).sum(1) / weight_NL1.sum(1).clamp(min=1)


def _pooling(folder: Path) -> str:
    """How tokens are pooled. Whether the folder normalises makes no difference: the towers want length 1."""
    modules = _json(folder / MODULES, kind=list)
    wrong = _layout(folder, f"{MODULES} {modules!r:.200}", "Transformer, Pooling and at most Normalize, in this order")
    try:
        kinds = [str(m["type"]).rpartition(".")[2] for m in modules]
        paths = [str(m["path"]) for m in modules]
    except (TypeError, KeyError) as error:
        raise wrong from error
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]) or paths[0] not in ("", "."):
        raise wrong
    pooling = _json(folder / paths[1] / "config.json")
    named = pooling.get("pooling_mode")  # newer files; older ones have a switch for each
    old = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
    said = [named] if named else [old.get(n, n) for n, on in pooling.items() if n.startswith("pooling_mode_") and on]
    if len(said) != 1 or said[0] not in _POOLINGS:
        raise _layout(folder, f"pooling {said}", f"one of {', '.join(_POOLINGS)}")
    return str(said[0])


def _files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise NotFound(
            "text encoder", came=str(folder), expected="a folder in sentence-transformers layout",
            fix="Set [models.tower] text_encoder to one, to lsa, or to nothing for none.",
        )  # fmt: skip
    weights = sorted(p.name for p in folder.glob("model*.safetensors"))
    if not (folder / MODULES).is_file():
        raise _layout(folder, f"no {MODULES}", "the layout that SentenceTransformer.save writes")
    if not weights:
        raise _layout(folder, "no model*.safetensors", "weights in safetensors; others are never unpickled")
    paths = [str(m.get("path", "")) for m in _json(folder / MODULES, kind=list) if isinstance(m, dict)]
    configs = [f"{p}/config.json" for p in paths if p and ".." not in Path(p).parts]
    return [n for n in (*_FILES, *configs, *weights) if (folder / n).is_file()]


def _version(folder: Path, files: list[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name} {sha256_file(folder / name)}\n".encode())
    return f"sentence-{digest.hexdigest()[:12]}"


def _json(path: Path, *, kind: type = dict, optional: bool = False) -> Any:
    if optional and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _corrupt(path, f"{error!s:.200}", "JSON") from error
    if not isinstance(found, kind):
        raise _corrupt(path, f"{found!r:.80}", f"JSON, a {kind.__name__}")
    return found


def _layout(folder: Path, came: str, expected: str) -> VersionMismatch:
    fix = "Name another folder in [models.tower] text_encoder: this encoder has not been taught its layout."
    return VersionMismatch(f"text encoder {folder}", came=came, expected=expected, fix=fix)


def _corrupt(path: Path, came: str, expected: str) -> CorruptData:
    return CorruptData(f"text encoder {path}", came=came, expected=expected, fix="Copy the folder again.")
