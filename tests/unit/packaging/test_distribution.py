"""What is shipped: the wheel, the commands, the make targets, the locks."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from recsys.cli.main import COMMANDS, cli, run

ROOT = Path(__file__).resolve().parents[3]
LOCKS = ("build", "cpu", "cuda", "dev")


def pip(*args: str, python: str = sys.executable) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_in_a_fresh_environment_has_the_stubs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("recsys", "llm_reranker", "feature_store", "streaming", "protos"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("double11-*.whl")

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    site = next(venv.glob("lib/python*/site-packages"))
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    # Our dependencies, after the fresh environment's own packages and without the editable double11 among them.
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "double11" not in entry.name:
            (libraries / entry.name).symlink_to(entry)
    (site / "libraries.pth").write_text(f"{libraries}\n")
    code = (
        "import double11.v1, recsys.core, feature_store, streaming, llm_reranker\n"
        "from double11.v1 import recommend_pb2, recommend_pb2_grpc\n"
        "from pathlib import Path\n"
        "root = Path(double11.v1.__file__).parent\n"
        "assert (root / 'py.typed').is_file() and (root / 'recommend.proto').is_file()\n"
        "assert (root / 'recommend_pb2.pyi').is_file()\n"
        "assert not (root.parents[1] / 'tests').exists()\n"
        "print(root)\n"
    )
    python = str(venv / "bin/python")
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "double11/v1")
    command = [python, "-c", "from recsys.cli.main import main; main(['doctor', '--help'])"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_there_and_explains_itself(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    done = CliRunner().invoke(command, ["--help"])
    assert done.exit_code == 0, done.output
    assert (command.help or "").strip(), name


def test_commands_start_without_heavy_libraries(tmp_path: Path) -> None:
    names = ", ".join(repr(n) for n in COMMANDS)
    code = (
        "import sys, click; from recsys.cli.main import cli\n"
        f"[cli.get_command(click.Context(cli), n) for n in ({names},)]\n"
        "print(sorted({'torch', 'faiss', 'transformers', 'torchrec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["no-such-command"], 2, "No such command"),
        (["doctor", "--no-such-flag"], 2, "--no-such-flag"),
        (["--log-level", "loud", "doctor"], 2, "--log-level"),
        (["doctor", "--json", "--no-such-flag"], 2, '"code": "USAGE"'),
    ],
)
def test_wrong_usage_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], code: int, message: str
) -> None:
    assert run(args) == code
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def test_a_path_that_cannot_be_written_is_a_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    source = tmp_path / "a.csv"
    source.write_text("user_id,item_id,behavior,timestamp\n1,10,view,1511539200\n")
    out = str(tmp_path / "file" / "out")
    assert run(["data", "import", "--format", "multi-behaviour", str(source), "--out", out, "--json"]) == 1
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert error["code"] == "IO_ERROR"
    assert str(tmp_path / "file") in error["message"]
    assert "permissions" in error["fix"]


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    code = (
        "import os; end, start = os.pipe(); os.close(end); os.dup2(start, 1)\n"
        "from recsys.cli.main import main; main(['data', 'formats'])"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")


def test_make_help_lists_the_targets_the_readme_names() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    listed = set(re.findall(r"^([a-z]+) ", done.stdout, re.MULTILINE))
    assert listed >= {"help", "setup", "check", "test", "demo", "bench", "protos", "lock", "clean"}
    named = set(
        re.findall(r"\bmake ([a-z]+)\b", (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text())
    )
    assert {"demo", "test"} <= named <= listed


def test_make_names_what_is_missing_without_python_3_11(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    for lock in LOCKS:
        (tmp_path / f"requirements/{lock}.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(["make", "setup", "PYTHON="], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "double11 needs Python 3.11" in done.stderr


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_pin_every_package_with_hashes_and_name_no_index(lock: str) -> None:
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    packages = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert packages
    for package in packages:
        assert re.match(r"[a-z0-9.-]+==\S+ \\\n", package), package.splitlines()[0]
        assert "--hash=sha256:" in package, package.splitlines()[0]
    assert "://" not in text
    assert ("\ntorch==" in text) == (lock == "cuda")


def test_locks_hold_what_pyproject_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[A-Za-z0-9-]+", d)[0].lower() for d in project["dependencies"]}  # type: ignore[index]
    for lock in ("cpu", "cuda"):
        pinned = set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / f"requirements/{lock}.txt").read_text(), re.MULTILINE))
        assert declared - {"torch"} <= pinned


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    lines = [line for line in script.read_text().splitlines() if line.startswith("make")]
    assert lines == ["make check", "make test"]
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
