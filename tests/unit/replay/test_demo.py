"""The demo's own parts: its home, its steps, what it does when a command fails. The walk itself is `make demo`."""

import asyncio
from pathlib import Path

import pytest

from recsys.cli import demo
from recsys.cli.main import run as double11
from recsys.core import BadInput, Conflict, Unavailable


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(Conflict, match="other things"):
        demo.Demo(home=tmp_path, keep=False).prepare()
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert double11(["demo", "--home", str(tmp_path)]) == 1


def test_an_earlier_home_is_emptied_unless_it_is_kept(tmp_path):
    home = tmp_path / "home"
    done: list[str] = []
    for keep in (False, True, False):
        walk = demo.Demo(home=home, keep=keep)
        walk.prepare()
        walk.step("1", "import", "Import", lambda: done.append("import"))
        walk.step("6", "serve", "Serve", lambda: done.append("serve"), always=True)
        assert list(walk.took_s) == ["import", "serve"]
    assert done == ["import", "serve", "serve", "import", "serve"]


def test_a_step_that_fails_is_not_marked_as_done(tmp_path):
    walk = demo.Demo(home=tmp_path / "home", keep=True)
    walk.prepare()
    with pytest.raises(BadInput):
        walk.step("1", "import", "Import", lambda: demo.command("data", "import", "--format", "no-such-format"))
    done: list[str] = []
    walk.step("1", "import", "Import", lambda: done.append("again"))
    assert done == ["again"]


def test_a_command_is_printed_as_one_would_type_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["replay", str(tmp_path / "demo out" / "data"), "--run", "/elsewhere/run"]
    assert demo.typed(words) == "double11 replay 'demo out/data' --run /elsewhere/run"
    with pytest.raises(BadInput, match=r"exit code 2.*Try it alone: double11 replay here --run nowhere --out there"):
        demo.command("replay", "here", "--run", "nowhere", "--out", "there", quiet=True)


def test_a_server_that_does_not_start_is_said_with_its_log(tmp_path):
    async def serve() -> None:
        async with demo._served(["serve", "--run", str(tmp_path / "nowhere")], tmp_path / "serve.log"):
            raise AssertionError("it serves nothing")

    with pytest.raises(Unavailable, match=r"serve\.log"):
        asyncio.run(serve())
    assert "no manifest.json" in Path(tmp_path / "serve.log").read_text()
