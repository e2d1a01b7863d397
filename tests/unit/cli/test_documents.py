"""With --json, standard output has the document and nothing else, whoever else prints."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from recsys.cli.main import run

NOISY = """
import ctypes, logging, os, subprocess, sys, types
import click
banner = logging.StreamHandler(sys.stdout)  # made before any command runs, as libraries do when they are imported
from recsys.cli import main
from recsys.cli.common import emit, json_option

@click.command()
@json_option
def noisy(as_json):
    banner.emit(logging.LogRecord("lib", 30, "", 0, "a library's log", (), None))
    print("a library's print")
    sys.__stdout__.write("held back")
    os.write(1, b"a C library's banner\\n")
    ctypes.CDLL(None).puts(b"buffered by C")
    ctypes.CDLL(None).fflush(None)
    subprocess.run(["echo", "a child"], check=True)
    emit({"rows": ["x" * 100_000]}, as_json=as_json, text=lambda: "the text")

sys.modules["recsys.cli.noisy"] = types.SimpleNamespace(noisy=noisy)
main.COMMANDS["noisy"] = "noisy"
main.main()
"""


def noisy(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", NOISY, "noisy", *args], capture_output=True, text=True, check=True)


def test_only_the_document_is_on_stdout():
    done = noisy("--json")
    assert json.loads(done.stdout) == {"rows": ["x" * 100_000]}
    assert done.stdout.count("\n") == 1
    for said in ("log", "print", "held back", "banner", "buffered", "a child"):
        assert said in done.stderr


def test_text_is_for_people_and_left_as_it_is():
    assert "the text" in noisy().stdout


def test_an_error_is_the_document_too():
    done = subprocess.run(
        [sys.executable, "-m", "recsys.cli.main", "bench", "nothing", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "USAGE"


@pytest.mark.parametrize(
    "command",
    [
        ["train", "data", "--out", "run"],
        ["distill", "data", "--run", "run"],
        ["replay", "data", "--run", "run", "--out", "report"],
        ["data", "simulate", "--out", "data"],
        ["load", "--target", "h:1", "--rate", "1", "--duration", "1", "--out", "report.json"],
        ["stress", "--target", "h:1", "--rate", "1", "--duration", "1", "--out", "report.json"],
    ],
)
@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_no_command_takes_a_seed_that_cannot_be_drawn_from(command, seed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([*command, "--seed", seed, "--json"]) == 2
    assert "--seed" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_load_does_not_begin_where_its_report_cannot_be_written(tmp_path, capsys):
    assert run(["load", "--target", "x", "--rate", "1", "--duration", "60", "--out", str(tmp_path), "--json"]) == 2
    assert "is a directory" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_whoever_has_replaced_stdout_gets_the_document(capfd: pytest.CaptureFixture):
    held = io.StringIO()
    with contextlib.redirect_stdout(held):
        assert run(["bench", "nothing", "--json"]) == 2
    assert json.loads(held.getvalue())["error"]["code"] == "USAGE"
    assert run(["bench", "nothing", "--json"]) == 2
    print("as before")
    found = capfd.readouterr().out.splitlines()
    assert json.loads(found[0])["error"]["code"] == "USAGE"
    assert found[1:] == ["as before"]


def test_a_reader_that_has_gone_is_no_error_of_ours():
    script = "from recsys.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "plan", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    _, error = process.communicate()
    assert "Traceback" not in error
