"""Flag > environment > file > default; unknown keys and values out of range are refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from recsys.core import BadInput, NotFound
from recsys.core.config import Config, in_range, section


@section("coretest")
@dataclass(frozen=True, kw_only=True)
class Outer:
    size: int = 1
    ratio: float = 0.5
    on: bool = False
    mode: Literal["wall", "data"] = "wall"
    folder: Path = Path(".")
    names: tuple[str, ...] = ()
    limit: int | None = None
    table: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        in_range("coretest.size", self.size, 1, 10)


@section("coretest.inner")
@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 2


def test_defaults_without_any_source() -> None:
    assert Config().get(Outer) == Outer()


@pytest.mark.parametrize(
    ("file", "environ", "flags", "expected"),
    [
        ({"coretest": {"size": 3}}, {}, {}, 3),
        ({"coretest": {"size": 3}}, {"DOUBLE11__CORETEST__SIZE": "4"}, {}, 4),
        ({"coretest": {"size": 3}}, {"DOUBLE11__CORETEST__SIZE": "4"}, {"coretest.size": 5}, 5),
        ({"coretest": {"size": 3}}, {}, {"coretest.size": None}, 3),
    ],
    ids=["file", "environment beats file", "flag beats environment", "absent flag"],
)
def test_precedence(file: dict[str, Any], environ: dict[str, str], flags: dict[str, Any], expected: int) -> None:
    assert Config(file, environ, flags).get(Outer).size == expected


def test_nested_section_by_file_and_environment() -> None:
    assert Config({"coretest": {"inner": {"size": 3}}}).get(Inner).size == 3
    assert Config({}, {"DOUBLE11__CORETEST__INNER__SIZE": "4"}).get(Inner).size == 4


def test_values_are_converted_to_the_field_types() -> None:
    environ = {
        "DOUBLE11__CORETEST__RATIO": "0.25",
        "DOUBLE11__CORETEST__ON": "true",
        "DOUBLE11__CORETEST__MODE": "data",
        "DOUBLE11__CORETEST__FOLDER": "/tmp/x",
        "DOUBLE11__CORETEST__NAMES": "a,b",
        "DOUBLE11__CORETEST__LIMIT": "9",
    }
    got = Config({"coretest": {"table": {"k": {"deep": 1}}}}, environ).get(Outer)
    assert (got.ratio, got.on, got.mode, got.folder) == (0.25, True, "data", Path("/tmp/x"))
    assert (got.names, got.limit, got.table) == (("a", "b"), 9, {"k": {"deep": 1}})


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ({"coretest": {"sise": 3}}, r"\[coretest\] sise"),
        ({"coretst": {"size": 3}}, r"\[coretst\] size"),
        ({"size": 3}, r"\[\] size"),
    ],
)
def test_a_key_that_no_section_owns_is_refused(file: dict[str, Any], names: str) -> None:
    with pytest.raises(BadInput, match=names):
        Config(file)


def test_unknown_environment_key_is_refused_but_paths_are_left_alone() -> None:
    with pytest.raises(BadInput, match="environment"):
        Config({}, {"DOUBLE11__CORETEST__SISE": "1"})
    Config({}, {"DOUBLE11_HOME": "/x", "DOUBLE11_DATA": "/y"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", "three"), ("size", 1.5), ("size", True), ("on", "yes"), ("mode", "moon"), ("ratio", "x"),
        ("table", "x"),
    ],
)  # fmt: skip
def test_value_of_another_type_is_refused_with_its_name(key: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"coretest.{key}"):
        Config({"coretest": {key: value}}).get(Outer)


@pytest.mark.parametrize("size", [0, 11, -1])
def test_value_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(BadInput, match="1 to 10"):
        Config({"coretest": {"size": size}}).get(Outer)


def test_nan_is_out_of_every_range() -> None:
    with pytest.raises(BadInput):
        in_range("x", float("nan"), 0, 1)


def test_load_reads_the_named_file_and_complains_about_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Config.load().get(Outer).size == 1
    (tmp_path / "double11.toml").write_text("[coretest]\nsize = 6\n")
    assert Config.load().get(Outer).size == 6
    with pytest.raises(NotFound, match="--config"):
        Config.load(tmp_path / "other.toml")
    (tmp_path / "bad.toml").write_text("[coretest\n")
    with pytest.raises(BadInput, match=r"bad\.toml"):
        Config.load(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(BadInput, match=r"latin\.toml"):
        Config.load(tmp_path / "latin.toml")


def test_only_dataclasses_own_sections() -> None:
    with pytest.raises(TypeError, match="dataclass"):
        section("coretest.bad")(int)
    with pytest.raises(TypeError, match="owns no section"):
        Config().get(dict)
