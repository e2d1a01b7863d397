"""What every command shares: --json, --config, ISO times, and the one JSON document last on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from recsys.core.errors import BadInput

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout.")
config_option = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="double11.toml to use (default ./double11.toml)."
)


def emit(document: Any, *, as_json: bool, text: Callable[[], str]) -> None:
    """Print the document as one JSON line, or its text form."""
    click.echo(json.dumps(document, default=str) if as_json else text())


def parse_time_us(value: str | None, option: str) -> int | None:
    """ISO 8601 to microseconds UTC; a time without zone is UTC.

    Raises: BadInput.
    """
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError as error:
        raise BadInput(option, came=value, expected="ISO 8601", fix="Write e.g. 2011-08-01T00:00:00Z.") from error
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return int((at - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * 1_000_000 + at.microsecond
