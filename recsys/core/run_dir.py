"""Run directories: one trained run, whole or absent, checked on opening. The only code that opens them.

    RUN/manifest.json      what is in the run; what it does not list does not exist
    RUN/items.parquet      item_id, item_key, and the item attributes as known at `until`
    RUN/models/ index/ reranker/VERSION/

A run is written under a temporary name beside its final one and renamed. `add_files` (distill) writes new files
first and then replaces the manifest by rename; nothing else is ever rewritten. Never pickle. Its files are readable by
whom the umask lets: it is often served by another user than trained it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from recsys.core.errors import BadInput, Conflict, CorruptData, NotFound, VersionMismatch

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_REQUIRED = (
    "format_version", "run_id", "parent", "dataset_hash", "until", "seed", "config", "versions", "commit",
    "feature_views", "measures", "files",
)  # fmt: skip
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """An opened, verified run. Use `open`; never build one by hand."""

    root: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, root: Path | str, *, verify: bool = True) -> RunDirectory:
        """Open a run and check every listed file's size and SHA-256.

        verify=False checks presence and size only (for a second process on the same host that trusts the first).
        Raises: NotFound when there is no manifest; CorruptData when a file is missing, short or altered, or the
        manifest is unreadable; VersionMismatch when a newer format wrote it; BadInput for a file that this user may
        not read.
        """
        root = Path(root)
        path = root / MANIFEST
        fix = "Train again, or copy the run directory whole (it is written to a temporary name and renamed)."
        with permitted(path, root):
            there = path.is_file()
        if not there:
            raise NotFound(
                f"run {root}",
                came="no manifest.json",
                expected="a run directory made by `double11 train`",
                fix=f"Make one: double11 train DIR --out {root}",
            )
        try:
            with permitted(path, root):
                manifest = json.loads(path.read_text("utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise CorruptData(f"{path}", came=str(error), expected="JSON", fix=fix) from error
        missing = [k for k in _REQUIRED if not isinstance(manifest, dict) or k not in manifest]
        if missing:
            raise CorruptData(f"{path}", came=f"no {', '.join(missing)}", expected=f"{', '.join(_REQUIRED)}", fix=fix)
        if manifest["format_version"] != FORMAT_VERSION:
            raise VersionMismatch(
                f"{path}, format_version",
                came=manifest["format_version"],
                expected=str(FORMAT_VERSION),
                fix="Use the double11 release that wrote it, or train again with this one.",
            )
        for name, entry in _file_list(manifest["files"], path, fix):
            _check_name(name)
            file = root / name
            with permitted(file, root):
                size = file.stat().st_size if file.is_file() else -1
                if size >= 0:
                    file.open("rb").close()  # safetensors would say that there is no such file
            if size != entry["bytes"]:
                came = "no such file" if size < 0 else f"{size} bytes"
                raise CorruptData(f"run file {file}", came=came, expected=f"{entry['bytes']} bytes", fix=fix)
            if verify and (digest := sha256_file(file)) != entry["sha256"]:
                raise CorruptData(f"run file {file}", came=f"sha256 {digest}", expected=entry["sha256"], fix=fix)
        return cls(root, manifest)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self.manifest["run_id"])

    @property
    def until_us(self) -> int:
        """Nothing at or after this time went into the run. Microseconds UTC."""
        return int(self.manifest["until"])

    def has(self, name: str) -> bool:
        """True when the manifest lists the file."""
        return name in self.manifest["files"]

    @property
    def work(self) -> Path:
        """The folder beside a run for what is made on the way: windows, lists, labels."""
        return beside(self.root, ".work")

    def path(self, name: str) -> Path:
        """Path of a listed file.

        Raises: NotFound for a file the manifest does not list, even if it lies there.
        """
        if not self.has(name):
            raise NotFound(
                f"run {self.run_id}, file {name}",
                came="not in the manifest",
                expected=f"one of {', '.join(sorted(self.manifest['files']))}",
                fix="Train (or distill) with the part that writes it.",
            )
        return self.root / name

    @contextmanager
    def settings_of(self, part: str) -> Iterator[None]:
        """Around the reading of a part's settings: one that is missing or unknown was written by another release.

        Raises: VersionMismatch.
        """
        try:
            yield
        except (KeyError, TypeError) as error:
            raise VersionMismatch(
                f"run {self.run_id}, {part}",
                came=f"settings of another release ({error})",
                expected="those that this release writes",
                fix="Use the double11 release that trained it, or train again with this one.",
            ) from error

    def files_under(self, folder: str) -> list[str]:
        """Listed files below a folder, sorted."""
        prefix = folder.rstrip("/") + "/"
        return sorted(n for n in self.manifest["files"] if n.startswith(prefix))

    def reranker_versions(self) -> list[str]:
        """Versions under reranker/, oldest first; the last one serves unless told otherwise."""
        return list(self.manifest.get("rerankers", []))

    def add_files(self, source: Path, folder: str, changes: Mapping[str, Any]) -> RunDirectory:
        """Copy the tree `source` to `folder` inside the run, then list it and merge `changes` into the manifest.

        The folder must be new. Readers see either the old manifest or the new one; of several writers one waits for
        the other.
        Raises: Conflict when the folder is already listed.
        """
        with _locked(self.root):
            fresh = RunDirectory(self.root, json.loads((self.root / MANIFEST).read_text("utf-8")))
            if fresh.files_under(folder):
                raise Conflict(
                    f"run {self.run_id}, folder {folder}",
                    came="already there",
                    expected="a new version",
                    fix="Choose another version, or pass --replace to add one and make it the serving version.",
                )
            target = self.root / folder
            shutil.rmtree(target, ignore_errors=True)  # left by a writer that died before it listed them
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target)
            added = {n: e for n, e in _describe(self.root).items() if n.startswith(folder.rstrip("/") + "/")}
            manifest = {**fresh.manifest, **changes, "files": {**fresh.manifest["files"], **added}}
            _write_manifest(self.root, manifest, [target, *target.rglob("*")])
        return RunDirectory(self.root, manifest)


class RunWriter:
    """Context manager that collects a run under a temporary name and renames it on success.

    with RunWriter(out, manifest_fields) as run:
        (run.path("models/ranker.json")).write_text(...)
    """

    def __init__(self, out: Path | str, fields: Mapping[str, Any], *, replace: bool = False) -> None:
        """fields: every manifest key but format_version and files.

        Raises: Conflict when `out` exists and replace is false, or it is no run; BadInput when a field is missing.
        """
        self.out, self._replace = Path(out).resolve(), replace  # behind a link, such as `current`, its run is replaced
        if self.out.exists() and not replace:
            raise Conflict(f"run {out}", came="it exists", expected="a new path", fix="Choose another --out.")
        if self.out.exists() and not _is_run(self.out):
            raise Conflict(
                f"run {out}", came="it exists and is no run", expected="a run, which is replaced, or a new path",
                fix="Choose another --out.",
            )  # fmt: skip
        self.fields: dict[str, Any] = dict(fields)
        self.root = Path()

    def __enter__(self) -> RunWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".tmp", dir=self.out.parent))
        return self

    def path(self, name: str) -> Path:
        """Where to write the file `name`; its folder is made."""
        _check_name(name)
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.root, ignore_errors=True)
            return
        manifest = {"format_version": FORMAT_VERSION, **self.fields, "files": _describe(self.root)}
        missing = [k for k in _REQUIRED if k not in manifest]
        if missing:
            shutil.rmtree(self.root, ignore_errors=True)
            raise BadInput("run manifest", came=f"no {', '.join(missing)}", expected="every field", fix="Pass them.")
        _write_manifest(self.root, manifest, self.root.rglob("*"))
        self.root.chmod(0o755)
        if self._replace and self.out.exists():
            old = self.out.with_name(f".{self.out.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
            self.root.rename(self.out)
            shutil.rmtree(old)
        else:
            self.root.rename(self.out)
        _fsync(self.out.parent)


@contextmanager
def permitted(path: Path, folder: Path) -> Iterator[None]:
    """Around the opening of a folder's file, which another user may have written. Raises: BadInput where we may not."""
    try:
        yield
    except PermissionError as error:
        raise BadInput(
            f"file {path}",
            came=f"{error.strerror} for user {os.geteuid()}",
            expected="a file that the process may read, in folders that it may enter",
            fix=f"As its owner: chmod -R a+rX {folder}; or let its owner run this.",
        ) from error


def beside(path: Path, suffix: str) -> Path:
    """PATH with a suffix, also of "." and ".."."""
    whole = Path(os.path.abspath(path))
    return whole.with_name(whole.name + suffix)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _is_run(root: Path) -> bool:
    """True for a run, be it damaged: other things have a manifest.json too."""
    try:
        manifest = json.loads((root / MANIFEST).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        return (root / "items.parquet").is_file()
    return isinstance(manifest, dict) and {"run_id", "files"} <= manifest.keys()


def _file_list(files: Any, path: Path, fix: str) -> list[tuple[str, dict[str, Any]]]:
    whole = isinstance(files, dict) and all(
        isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values()
    )
    if not whole:
        raise CorruptData(f"{path}, files", came=f"{files!r:.80}", expected="{path: {sha256, bytes}}", fix=fix)
    return list(files.items())


def _describe(root: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {
        p.relative_to(root).as_posix(): {"sha256": sha256_file(p), "bytes": p.stat().st_size}
        for p in files
    }  # fmt: skip


def _write_manifest(root: Path, manifest: Mapping[str, Any], new: Iterable[Path]) -> None:
    """new: files and folders that it lists from now on. They get its mode: safetensors makes files for their owner
    alone, and copies have the mode of what was copied.
    """
    temporary = root / f".{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as f:
        mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
        for path in new:
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)
        json.dump(manifest, f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(root / MANIFEST)
    _fsync(root)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else who asks is in here meanwhile. The folder itself is the lock: nothing is left behind."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _fsync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise CorruptData(
            "run manifest, files", came=name, expected="a relative path inside the run", fix="Do not use this run."
        )
