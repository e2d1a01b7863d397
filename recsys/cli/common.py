"""What every command shares: --json, --config, ISO times, and the one JSON document last on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click

from recsys.core.errors import BadInput

_say: ContextVar[Callable[[str], None]] = ContextVar("say", default=click.echo)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document last on stdout.")
SEED_MAX = 2**32 - 1  # what every library that draws accepts
seed_option = click.option("--seed", type=click.IntRange(0, SEED_MAX), default=0, show_default=True)
config_option = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="double11.toml to use (default ./double11.toml)."
)


def emit(document: Any, *, as_json: bool, text: Callable[[], str]) -> None:
    """Print the document as one JSON line, or its text form."""
    _say.get()(json.dumps(document, default=str) if as_json else text())


@contextmanager
def only_documents() -> Iterator[None]:
    """Leave standard output to `emit`: what else is printed, by C libraries and children too, is for stderr."""
    stdout, saved = sys.stdout, os.dup(1)
    stdout.flush()
    sys.stdout = sys.stderr
    os.dup2(2, 1)
    told = _say.set(partial(_write, saved) if _is_fd_1(stdout) else partial(click.echo, file=stdout))
    try:
        yield
    finally:
        stdout.flush()  # what a library held on to, which began before us
        os.dup2(saved, 1)
        os.close(saved)
        sys.stdout = stdout
        _say.reset(told)


def _is_fd_1(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError):  # of a test, in memory
        return False


def _write(descriptor: int, line: str) -> None:
    left = memoryview(f"{line}\n".encode())
    while left:
        left = left[os.write(descriptor, left) :]


def parse_time_us(value: str | None, option: str) -> int | None:
    """ISO 8601 to microseconds UTC; a time without zone is UTC.

    Raises: BadInput.
    """
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise BadInput(option, came=value, expected="ISO 8601", fix="Write e.g. 2011-08-01T00:00:00Z.") from error
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
