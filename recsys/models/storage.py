"""A model on disk: NAME.safetensors (weights, vocabularies) and NAME.json (settings). Never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys.core import CorruptData, RunDirectory, disk


@dataclass(frozen=True, slots=True)
class Stored:
    """What a model file pair holds. version: the first 12 hex digits of the weights' SHA-256."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    version: str

    def section(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below `prefix.`, without it."""
        return {n[len(prefix) + 1 :]: t for n, t in self.tensors.items() if n.startswith(prefix + ".")}


def save(folder: Path, name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write both files and return the version. The same tensors give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    with disk.writing(path):
        save_file({n: tensors[n].detach().contiguous().clone() for n in sorted(tensors)}, path)
    (folder / f"{name}.json").write_text(json.dumps(settings, indent=1, sort_keys=True), "utf-8")
    return _version(path)


def load(run: RunDirectory, name: str) -> Stored:
    """Read both files of a run's model.

    Raises: NotFound when the run has no such model; CorruptData for files that do not parse.
    """
    weights, settings = run.path(f"models/{name}.safetensors"), run.path(f"models/{name}.json")
    try:
        return Stored(json.loads(settings.read_text("utf-8")), load_file(weights), _version(weights))
    except (SafetensorError, ValueError, OSError) as error:
        raise CorruptData(
            f"run {run.run_id}, model {name}",
            came=str(error),
            expected="a safetensors file and its JSON settings",
            fix="Copy the run again, or train again.",
        ) from error


def restore(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Fill a model with stored weights and put it in evaluation mode.

    Raises: CorruptData when names or shapes are not the model's.
    """
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise CorruptData(what, came=str(error), expected="the weights of its settings", fix="Train again.") from error
    model.eval()


def keys_tensor(keys: Any) -> Tensor:
    """int64 NumPy keys as a tensor of their own."""
    return torch.from_numpy(keys.copy())


def _version(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
