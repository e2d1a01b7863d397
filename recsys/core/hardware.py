"""What a figure was measured on: CPU, instruction set, cores, memory, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PARTS = ("torch", "torchrec", "fbgemm-gpu-cpu", "faiss-cpu", "numpy", "polars", "transformers", "grpcio")


@cache
def describe() -> dict[str, Any]:
    """CPU model, ISA (avx2, avx512f, avx512_vnni, amx), cores, memory in GiB, Python and library versions."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags").split())
    isa = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags]
    memory_kib = int((_field(_read("/proc/meminfo"), "MemTotal") or "0 kB").split()[0])
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor(),
        "isa": isa,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "python": platform.python_version(),
        "versions": versions(),
    }


@cache
def versions() -> dict[str, str]:
    """Installed versions of the libraries that decide speed and numerics; absent ones are left out."""
    found = {}
    for part in _PARTS:
        try:
            found[part] = metadata.version(part)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str:
    """The commit of the source tree (with "+dirty" for uncommitted changes), or "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + (
            "+dirty" if git("status", "--porcelain").strip() else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        if line.startswith(name) and ":" in line:
            return line.split(":", 1)[1].strip()
    return ""
