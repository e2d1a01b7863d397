"""Configuration: frozen dataclasses beside their owners, one `double11.toml`, one section per owner.

Precedence: flag > environment (DOUBLE11__SECTION__KEY; a dot in a section is one more `__`) > file > default.
A key that no section owns is refused, and so is a value out of its range (owners check in __post_init__ with
`in_range`). One file serves every process, so `Config.load` first imports the owners of all sections: light modules,
named by the entry points `double11.config` in pyproject.toml. DOUBLE11_NAME (one underscore) names paths and tests,
never configuration.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from recsys.core.errors import BadInput, NotFound

T = TypeVar("T")
_SECTIONS: dict[str, type[Any]] = {}
_PREFIX = "DOUBLE11__"


def section(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: the frozen, keyword-only dataclass owns `[name]` in double11.toml."""

    def register(cls: type[T]) -> type[T]:
        if not dataclasses.is_dataclass(cls):
            raise TypeError(f"{cls.__qualname__} must be a dataclass to own [{name}]")
        _SECTIONS[name] = cls
        return cls

    return register


def in_range(name: str, value: float, low: float, high: float, *, fix: str = "Set it inside the range.") -> None:
    """Raise BadInput unless low <= value <= high (NaN is outside)."""
    if not low <= value <= high:
        raise BadInput(f"configuration {name}", came=value, expected=f"{low} to {high}", fix=fix)


class Config:
    """All sections, resolved on demand. `config.get(JobConfig)` gives the owner's dataclass."""

    def __init__(
        self,
        file: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        """file: parsed TOML. environ: defaults to nothing. flags: {"section.key": value}, None values ignored."""
        self._values: dict[str, dict[str, Any]] = {}
        for origin, flat in (
            ("file", _flatten(file or {})),
            ("environment", _from_environ(environ or {})),
            ("flag", {k: v for k, v in (flags or {}).items() if v is not None}),
        ):
            for dotted, value in flat.items():
                name, _, key = dotted.rpartition(".")
                self._check_owned(name, key, origin)
                self._values.setdefault(name, {})[key] = value

    @classmethod
    def load(cls, path: Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
        """Read --config PATH, else ./double11.toml where it exists, and this process's environment.

        Raises: NotFound for a named file that is not there; BadInput for TOML that does not parse.
        """
        _import_owners()
        file: Mapping[str, Any] = {}
        chosen = path or Path("double11.toml")
        if path is not None and not path.is_file():
            raise NotFound("--config", came=str(path), expected="a TOML file", fix="Correct the path or leave it out.")
        if chosen.is_file():
            try:
                file = tomllib.loads(chosen.read_text("utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise BadInput(str(chosen), came=str(error), expected="valid TOML", fix="Mend that line.") from error
        return cls(file, os.environ, flags)

    def get(self, owner: type[T]) -> T:
        """The section of `owner` as its dataclass; values are converted to the fields' types."""
        name = next((n for n, c in _SECTIONS.items() if c is owner), None)
        if name is None:
            raise TypeError(f"{owner.__qualname__} owns no section; decorate it with @section")
        hints = typing.get_type_hints(owner)
        values = {k: _convert(f"{name}.{k}", v, hints[k]) for k, v in self._values.get(name, {}).items()}
        return owner(**values)

    @staticmethod
    def _check_owned(name: str, key: str, origin: str) -> None:
        owner = _SECTIONS.get(name)
        known = [f.name for f in dataclasses.fields(owner)] if owner else []
        if key not in known:
            expected = f"[{name}] with one of {known}" if owner else f"a section of {sorted(_SECTIONS)}"
            raise BadInput(
                f"configuration ({origin})", came=f"[{name}] {key}", expected=expected, fix="Correct the name."
            )


def sections() -> Mapping[str, type[Any]]:
    """Every registered section and its owner."""
    return types.MappingProxyType(_SECTIONS)


@cache
def _import_owners() -> None:
    for owner in metadata.entry_points(group="double11.config"):
        owner.load()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for k, v in tree.items():
        dotted = f"{prefix}{k}"
        owner = _SECTIONS.get(prefix.rstrip("."))
        is_value = owner is not None and k in {f.name for f in dataclasses.fields(owner)}
        flat.update(_flatten(v, dotted + ".") if isinstance(v, Mapping) and not is_value else {dotted: v})
    return flat


def _from_environ(environ: Mapping[str, str]) -> dict[str, str]:
    return {k[len(_PREFIX) :].lower().replace("__", "."): v for k, v in environ.items() if k.startswith(_PREFIX)}


def _convert(name: str, value: Any, hint: Any) -> Any:
    optional = get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        hint = next(a for a in get_args(hint) if a is not type(None))
    try:
        if hint is bool:
            text = str(value).lower()
            if text not in ("true", "false", "1", "0"):
                raise ValueError("not a boolean")
            return text in ("true", "1")
        if hint in (int, float, str):
            if isinstance(value, bool) or (hint is int and isinstance(value, float) and not value.is_integer()):
                raise ValueError(f"not {hint.__name__}")
            return hint(value)
        if hint is Path:
            return Path(value)
        if get_origin(hint) is tuple:
            parts = value.split(",") if isinstance(value, str) else list(value)
            return tuple(_convert(name, p, get_args(hint)[0]) for p in parts if p != "")
        if get_origin(hint) in (dict, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError("not a table")
            return dict(value)
        if get_origin(hint) is typing.Literal:
            if value not in get_args(hint):
                raise ValueError(f"not one of {get_args(hint)}")
            return value
    except (TypeError, ValueError) as error:
        raise BadInput(f"configuration {name}", came=f"{value!r}", expected=str(hint), fix="Correct it.") from error
    raise TypeError(f"{name}: no conversion to {hint}")
