"""Every owner of a section of double11.toml is an entry point, so that any process can check the whole file."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("recsys", "streaming", "feature_store", "llm_reranker")


def test_every_owner_is_named_in_pyproject_and_installed() -> None:
    owners = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if re.search(r'^@section\("', path.read_text("utf-8"), re.MULTILINE)
    }
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["double11.config"]
    assert set(declared.values()) == owners
    installed = {e.value for e in metadata.entry_points(group="double11.config")}
    assert installed == owners, "run make setup"


def test_loading_configuration_loads_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from recsys.core.config import Config; Config.load(); "
        "print(sorted({'torch', 'faiss', 'transformers', 'torchrec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
