"""`double11 doctor`: what is installed, what works, what is missing and how to get it.

Libraries that can die on the wrong processor are tried in a child process, so that doctor survives to report it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import click

from recsys.cli.common import emit, json_option
from recsys.core import hardware
from recsys.core.urls import default_url, embedded_path

_ROOT = Path(__file__).resolve().parents[2]
_SETUP = "make setup (TORCH_INDEX=URL names an index of torch's CPU build)"
_FREE_GIB_MIN = 2.0
_MEMORY_GIB_MIN = 4.0
_PROBE_S_MAX = 120.0
_CONNECT_S_MAX = 2.0
# A small true operation of each library; prints what was found.
_PROBES = {
    "torch": """
import torch
assert float((torch.ones(4, 4) @ torch.ones(4, 4)).sum()) == 64
build = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} devices" if torch.version.cuda else "CPU build"
print(torch.__version__, build, torch.backends.cpu.get_cpu_capability())""",
    "fbgemm": """
import torch, fbgemm_gpu
assert torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 0, 3])).tolist() == [0, 2, 2, 5]
print("jagged operators work")""",
    "torchrec": """
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
table = EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=8, feature_names=["f"])
bags = EmbeddingBagCollection([table])
found = bags(KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 2, 3]), torch.tensor([1, 0, 2])))
assert found["f"].shape == (3, 4)
print("embedding bags work")""",
    "faiss": """
import faiss, numpy as np
index = faiss.IndexFlatIP(4)
index.add(np.eye(4, dtype=np.float32))
assert index.search(np.eye(4, dtype=np.float32), 1)[1].ravel().tolist() == [0, 1, 2, 3]
print(faiss.__version__, faiss.get_compile_options().strip())""",
    "transformers": """
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
print("Qwen3-MoE is there")""",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One finding. needed: the embedded default does not work without it. fix: the command or step that mends it."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    needed: bool = True


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Say what is installed, what works, what is missing and how to get it; exit 1 when the default would not work."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        probes = [pool.submit(_probe, name) for name in _PROBES]
        checks = [*_machine(), _packages(), *(p.result() for p in probes), *_storage(), _java(), *_variables()]
    works = all(c.ok for c in checks if c.needed)
    emit({"ok": works, "checks": [asdict(c) for c in checks]}, as_json=as_json, text=lambda: _text(checks, works))
    return 0 if works else 1


def _machine() -> Iterator[Check]:
    machine = hardware.describe()
    version = sys.version_info[:2]
    yield Check(
        name="python",
        ok=version == (3, 11),
        found=machine["python"],
        fix="Install Python 3.11, then: make clean setup PYTHON=python3.11",
    )
    yield Check(
        name="cpu",
        ok="avx2" in machine["isa"],
        found=f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['isa']) or 'no AVX2'}",
        fix="Use a processor with AVX2: fbgemm and faiss are built for it.",
    )
    yield Check(
        name="memory",
        ok=machine["memory_gib"] >= _MEMORY_GIB_MIN,
        found=f"{machine['memory_gib']} GiB",
        fix=f"Give the machine {_MEMORY_GIB_MIN:.0f} GiB.",
    )


def pins(root: Path = _ROOT) -> dict[str, str]:
    """Package to version as locked for this build of torch; empty outside a checkout.

    Source: requirements/*.txt, and pyproject.toml's exact pin for torch, which the CPU lock leaves out.
    """
    variant = "cuda.txt" if _installed("fbgemm-gpu") else "cpu.txt"
    texts = [p.read_text("utf-8") for n in (variant, "dev.txt") if (p := root / "requirements" / n).is_file()]
    found = {n: v for t in texts for n, v in re.findall(r"^([a-z0-9.-]+)==(\S+)", t, re.MULTILINE)}
    torch = [r.partition("==")[2] for r in metadata.requires("double11") or [] if r.startswith("torch==")]
    return {**found, "torch": torch[0]} if found and torch else found


def _packages() -> Check:
    locked = pins()
    if not locked:
        return Check(name="packages", ok=True, found="not a checkout: no lock to compare with")
    wrong = []
    for name, pinned in sorted(locked.items()):
        installed = _installed(name)
        if installed.partition("+")[0] != pinned:
            wrong.append(f"{name} {installed or 'missing'} (pinned {pinned})")
    return Check(name="packages", ok=not wrong, found=", ".join(wrong) or f"{len(locked)} as locked", fix=_SETUP)


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _probe(name: str) -> Check:
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROBES[name]],
            capture_output=True,
            text=True,
            timeout=_PROBE_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(
            name=name, ok=False, found=f"no answer within {_PROBE_S_MAX:.0f} s", fix="Free some memory and CPU."
        )
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Check(
        name=name, ok=done.returncode == 0, found=done.stdout.strip() if done.returncode == 0 else last, fix=_SETUP
    )


def _storage() -> Iterator[Check]:
    where = embedded_path(default_url(), "DOUBLE11_HOME").absolute()
    existing = next(p for p in (where, *where.parents) if p.exists())
    fix = "Set DOUBLE11_HOME to a folder of yours on a local disk."
    free_gib = shutil.disk_usage(existing).free / 2**30
    yield Check(name="disk", ok=free_gib >= _FREE_GIB_MIN, found=f"{free_gib:.1f} GiB free at {where}", fix=fix)
    try:
        took_ms = _commit_ms(existing)
    except (OSError, ImportError) as error:
        yield Check(name="store", ok=False, found=f"{where}: {error}", fix=fix)
        return
    yield Check(name="store", ok=True, found=f"LMDB commit with fsync in {took_ms:.1f} ms at {where}")


def _commit_ms(folder: Path) -> float:
    import lmdb

    with tempfile.TemporaryDirectory(prefix=".double11-doctor.", dir=folder) as path:
        try:
            with lmdb.open(path, map_size=1 << 20) as store:
                start_s = time.perf_counter()
                with store.begin(write=True) as write:
                    write.put(b"key", b"value")
                took_ms = (time.perf_counter() - start_s) * 1e3
                with store.begin() as read:
                    assert read.get(b"key") == b"value"
        except lmdb.Error as error:
            raise OSError(str(error)) from error
    return took_ms


def _java() -> Check:
    program = shutil.which("java")
    lines = []
    if program:
        done = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=30, check=False)
        lines = done.stderr.splitlines() if done.returncode == 0 else []
    return Check(
        name="java",
        ok=bool(lines),
        found=lines[0] if lines else "none that runs",
        needed=False,
        fix="For tests against Apache Kafka: apt-get install openjdk-17-jre-headless, then set DOUBLE11_KAFKA_HOME.",
    )


def _variables() -> Iterator[Check]:
    """The optional DOUBLE11_* variables: unset is fine, set and unusable is not."""
    answers: dict[str, Callable[[str], str]] = {
        "DOUBLE11_DATA": lambda v: _folder(v, "README.md"),
        "DOUBLE11_KAFKA_HOME": lambda v: _folder(v, "libs"),
        "DOUBLE11_CONTROL_PLANE": lambda v: _folder(v, "cluster.sh"),
        "DOUBLE11_KAFKA": _answers,
        "DOUBLE11_REDIS": _answers,
    }
    for name, check in answers.items():
        value = os.environ.get(name)
        problem = check(value) if value else ""
        yield Check(
            name=name,
            ok=not problem,
            found=f"{value}: {problem or 'ok'}" if value else "not set (optional)",
            needed=bool(value),
            fix=f"Correct it, or: unset {name}",
        )


def _folder(value: str, member: str) -> str:
    return "" if (Path(value) / member).exists() else f"no {member} there"


def _answers(value: str) -> str:
    """Empty when something listens at host:port, or at the address of a URL; what went wrong otherwise."""
    try:
        url = urlsplit(value if "://" in value else f"//{value}")
        default_port = 6379 if url.scheme.startswith("redis") else 9092
        with socket.create_connection((url.hostname or "", url.port or default_port), timeout=_CONNECT_S_MAX):
            return ""
    except (OSError, ValueError) as error:
        return str(error)


def _text(checks: list[Check], works: bool) -> str:
    lines = []
    for check in checks:
        mark = "ok  " if check.ok else ("MISS" if check.needed else "--  ")
        lines.append(f"{mark} {check.name:<24}{check.found}")
        if not check.ok:
            lines.append(f"     {'':<24}{check.fix}")
    lines.append("The embedded default works: make demo" if works else "The embedded default does not work; see MISS.")
    return "\n".join(lines)
