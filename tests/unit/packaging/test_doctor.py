"""Doctor finds what is wrong, says how to mend it, and exits accordingly."""

import json
import socket
from pathlib import Path

import pytest

from recsys.cli import doctor
from recsys.cli.main import run


def found(capsys: pytest.CaptureFixture[str]) -> tuple[bool, dict[str, dict[str, object]]]:
    document = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return document["ok"], {c["name"]: c for c in document["checks"]}


def test_this_machine_runs_the_embedded_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOUBLE11_HOME", str(tmp_path / "not" / "there" / "yet"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("DOUBLE11_REDIS", f"redis://127.0.0.1:{server.getsockname()[1]}/0")
        code = run(["doctor", "--json"])
    ok, checks = found(capsys)
    assert {n: c["found"] for n, c in checks.items() if c["needed"] and not c["ok"]} == {}
    assert (code, ok) == (0, True)
    assert checks["torch"]["found"].startswith("2.13.0")  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == [], "doctor left something behind"


def test_variables_that_lead_nowhere_fail_with_a_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setattr(doctor, "_PROBES", {"absent": "import no_such_library"})
    monkeypatch.setenv("DOUBLE11_DATA", str(tmp_path))
    monkeypatch.setenv("DOUBLE11_KAFKA", f"127.0.0.1:{closed}")
    code = run(["doctor", "--json"])
    ok, checks = found(capsys)
    assert (code, ok) == (1, False)
    wrong = {n for n, c in checks.items() if c["needed"] and not c["ok"]}
    assert wrong == {"absent", "DOUBLE11_DATA", "DOUBLE11_KAFKA"}
    assert "No module named 'no_such_library'" in str(checks["absent"]["found"])
    assert checks["DOUBLE11_DATA"]["fix"] == "Correct it, or: unset DOUBLE11_DATA"
    run(["doctor"])
    assert "MISS DOUBLE11_KAFKA" in capsys.readouterr().out


def test_pins_are_those_of_the_lock_and_differences_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.pins(tmp_path) == {}
    pins = doctor.pins()
    assert pins["torch"] == "2.13.0"
    assert pins["torchrec"] == "1.9.2"
    monkeypatch.setattr(doctor, "pins", lambda: {"numpy": "0.1", "no-such-package": "1"})
    check = doctor._packages()
    assert not check.ok
    assert "numpy" in check.found
    assert "no-such-package missing (pinned 1)" in check.found


def test_a_folder_that_cannot_be_written_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOUBLE11_HOME", "/proc/double11")
    checks = {c.name: c for c in doctor._storage()}
    assert not checks["store"].ok
    assert "DOUBLE11_HOME" in checks["store"].fix
