"""[heavy] Snapshots of a live index: a folder, written under a temporary name and renamed; whole or absent.

    ROOT/live-00000007/manifest.json       run, dimension, where reading goes on, {file: {sha256, bytes}}
                       ann.faiss ann.json  the base, as in a run
                       live.safetensors    living rows of the base, attributes, the delta

The newest is read, older ones are removed once a newer one is there. A folder that was cut off has no final name.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from recsys.candidates.nearest.live import LiveIndex
from recsys.candidates.nearest.rows import RowSet
from recsys.candidates.nearest.static import AnnIndex
from recsys.core import CorruptData, NotFound, VersionMismatch, disk
from recsys.core.attributes import COLUMNS, Attributes
from recsys.core.run_dir import sha256_file
from recsys.models.config import IndexConfig, LiveIndexConfig

FORMAT_VERSION = 2
MANIFEST, _BASE, _FACTS, _LIVE = "manifest.json", "ann.faiss", "ann.json", "live.safetensors"
_FILES = (_BASE, _FACTS, _LIVE)


@dataclass(frozen=True, slots=True)
class Restored:
    """A live index as it was, positions [partition -> next offset] of its source, and what else was kept with it."""

    index: LiveIndex
    positions: Mapping[int, int] = field(default_factory=dict)
    more: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def write(
    root: Path,
    index: LiveIndex,
    *,
    run_id: str,
    positions: Mapping[int, int],
    more: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Path:
    """Write a snapshot below `root` and remove older ones. positions, and more: taken before this call, never after.

    Searches and writes go on; what is written is one moment of the index. Raises: OSError from the disk.
    """
    root.mkdir(parents=True, exist_ok=True)
    base, attributes, alive, item_key, vectors, known = index.capture()
    temporary = Path(tempfile.mkdtemp(prefix=".live-", suffix=".tmp", dir=root))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # no longer there once it has its name
        base.save(temporary, run_id)
        arrays = {f"base.{c}": getattr(attributes, c) for c in COLUMNS} | {
            f"delta.{c}": getattr(known, c) for c in COLUMNS
        }
        arrays |= {"base.alive": alive.bits, "delta.item_key": item_key, "delta.vectors": vectors}
        arrays |= {f"more.{name}": array for name, array in (more or {}).items()}
        with disk.writing(temporary / _LIVE):
            save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, temporary / _LIVE)
        manifest = {
            "format_version": FORMAT_VERSION, "run_id": run_id, "dim": index.dim,
            "positions": {str(p): o for p, o in positions.items()},
            "files": {n: _describe(temporary / n) for n in _FILES},
        }  # fmt: skip
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        for name in (*_FILES, MANIFEST, "."):
            _fsync(temporary / name)
        older = _numbered(root)
        target = root / f"live-{(older[-1][0] + 1 if older else 1):08d}"
        temporary.rename(target)
        _fsync(root)
    for _, folder in older:
        shutil.rmtree(folder, ignore_errors=True)
    for left in root.glob(".live-*.tmp"):  # of a process that died here
        shutil.rmtree(left, ignore_errors=True)
    return target


def read(root: Path, *, run_id: str, dim: int, config: IndexConfig, live: LiveIndexConfig) -> Restored:
    """The newest snapshot below `root`.

    Raises: NotFound when there is none; CorruptData when a file is missing, short or altered; VersionMismatch when it
    is of another format, run or dimension, or has more changed items than `live` has room for.
    """
    folders = _numbered(root)
    if not folders:
        raise NotFound(
            f"index snapshots {root}", came="none", expected="a folder live-N", fix="Start from the run's index."
        )
    folder = folders[-1][1]
    manifest = _manifest(folder)
    _check_fits(folder, manifest, run_id, dim)
    for name in _FILES:
        _check_file(folder, name, manifest["files"])
    base = AnnIndex.read(folder / _BASE, folder / _FACTS, config)
    try:
        arrays: dict[str, npt.NDArray[Any]] = load_file(folder / _LIVE)
        known = {part: Attributes(**{c: arrays[f"{part}.{c}"] for c in COLUMNS}) for part in ("base", "delta")}
        alive = RowSet(len(base), arrays["base.alive"])
    except (SafetensorError, KeyError) as error:
        raise _corrupt(folder / _LIVE, str(error), "the arrays of a snapshot") from error
    if (changed := len(known["delta"])) > live.delta_items_max:
        raise VersionMismatch(
            f"index snapshot {folder}",
            came=f"{changed} items changed since its base was built",
            expected=f"at most models.index.live.delta_items_max, {live.delta_items_max}",
            fix="Raise it, or remove the folder: the index is then made from the run and the log.",
        )
    index = LiveIndex(base, known["base"], config=config, live=live)
    index.restore(alive, arrays["delta.item_key"], arrays["delta.vectors"], known["delta"])
    more = {n.removeprefix("more."): a for n, a in arrays.items() if n.startswith("more.")}
    return Restored(index=index, positions={int(p): int(o) for p, o in manifest["positions"].items()}, more=more)


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _corrupt(path, str(error), "the manifest of a snapshot") from error
    missing = {"format_version", "run_id", "dim", "positions", "files"} - set(manifest)
    if missing:
        raise _corrupt(path, f"no {sorted(missing)}", "the manifest of a snapshot")
    found: dict[str, Any] = manifest
    return found


def _check_fits(folder: Path, manifest: Mapping[str, Any], run_id: str, dim: int) -> None:
    came = manifest["format_version"], manifest["run_id"], manifest["dim"]
    if came != (FORMAT_VERSION, run_id, dim):
        raise VersionMismatch(
            f"index snapshot {folder}",
            came="format {}, run {}, dimension {}".format(*came),
            expected=f"format {FORMAT_VERSION}, run {run_id}, dimension {dim}",
            fix="Remove the folder: the index is then made from the run and the log.",
        )


def _check_file(folder: Path, name: str, files: Mapping[str, Any]) -> None:
    path, entry = folder / name, files.get(name, {})
    size = path.stat().st_size if path.is_file() else -1
    if size != entry.get("bytes"):
        raise _corrupt(path, "no such file" if size < 0 else f"{size} bytes", f"{entry.get('bytes')} bytes")
    if (digest := sha256_file(path)) != entry.get("sha256"):
        raise _corrupt(path, f"sha256 {digest}", str(entry.get("sha256")))


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """Whole snapshots below `root`, oldest first."""
    found = [(p.name.removeprefix("live-"), p) for p in root.glob("live-*") if p.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdigit())


def _corrupt(path: Path, came: str, expected: str) -> CorruptData:
    return CorruptData(
        str(path),
        came=came,
        expected=expected,
        fix="Remove the folder: the index is then made from the run and the log.",
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
