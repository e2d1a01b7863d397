"""Documentation says what is true of this commit: links, commands and flags, sections, metrics, modules."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import prometheus_client
import pytest

from recsys.cli.main import COMMANDS, cli
from recsys.core import metrics
from recsys.core.config import Config, sections

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
page = pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def modules_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("modules", ROOT / "docs/modules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@page
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@page
def test_nobody_is_told_to_install_somebody_elses_package(path: Path) -> None:
    assert "pip install double11" not in path.read_text("utf-8")


def commands(text: str) -> list[list[str]]:
    """Every `double11 ...` of a page, in code blocks and in backticks, as words."""
    lines = re.findall(r"^    (.*double11 .*)$", text, re.MULTILINE) + re.findall(r"`(double11 [^`]+)`", text)
    parts = [part.strip() for line in lines for part in re.split(r"&&|\||  ", line.split("#")[0])]
    return [shlex.split(part) for part in parts if part.startswith("double11 ")]


@page
def test_commands_and_flags_exist(path: Path) -> None:
    for words in commands(path.read_text("utf-8")):
        command: click.Command = cli
        rest = words[1:]
        while (
            isinstance(command, click.Group)
            and rest
            and rest[0].split("|")[0] in command.list_commands(click.Context(command))
        ):
            found = command.get_command(click.Context(command), rest.pop(0))
            assert found is not None
            command = found
        assert command is not cli, words
        flags = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {w.split("=")[0] for w in rest if w.startswith("--")} <= flags, words


def test_every_command_is_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert all(re.search(rf"\b{name}\b", text) for name in COMMANDS)


def test_sections_of_the_configuration_are_listed() -> None:
    Config.load()
    named = set(re.findall(r"`\[([a-z_.]+)\]`", (ROOT / "docs/operations.md").read_text()))
    ours = {
        n
        for n, owner in sections().items()
        if not n.startswith("coretest") and owner.__module__.split(".")[0] != "test"
    }
    assert named == ours


def test_metrics_named_are_those_there_are() -> None:
    families = {
        m
        for c in vars(metrics).values()
        if isinstance(c, prometheus_client.metrics.MetricWrapperBase)
        for m in [c._name]
    }
    named = set(re.findall(r"`(double11_[a-z_]+)", (ROOT / "docs/operations.md").read_text()))
    assert {n.removesuffix("_total") for n in named} <= families


def test_module_list_is_current() -> None:
    script = modules_script()
    text = script.PAGE.read_text("utf-8")
    assert script.page(text) == text, "run: make docs"


def test_decisions_have_the_four_parts_and_a_number_each() -> None:
    decisions = sorted((ROOT / "docs/adr").glob("*.md"))
    numbers = [int(path.name.split("-")[0]) for path in decisions]
    assert len(set(numbers)) == len(numbers)
    for number, path in zip(numbers, decisions, strict=True):
        assert path.name.startswith(f"{number:04}-")
        text = path.read_text("utf-8")
        assert text.startswith(f"# ADR {number}: ")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Status", "Context", "Decision", "Consequences"]


def test_readme_begins_with_the_two_commands() -> None:
    head = (ROOT / "README.md").read_text().split("\n```")[0]
    assert head.index("make demo") < head.index("make test")


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
