"""Progress bars on stderr for long work; silent when stderr is not a terminal and nothing asks for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Never, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(*, total: int | None = None, initial: int = 0, what: str = "", unit: str = "it") -> tqdm[Never]:
    """A progress bar to `update(n)` by hand, from `initial` on; use it as a context manager."""
    return tqdm(total=total, initial=initial, desc=what, unit=unit, file=sys.stderr, disable=_silent(), mininterval=0.5)


def track(items: Iterable[T], *, total: int | None = None, what: str = "", unit: str = "it") -> Iterable[T]:
    """Iterate with a progress bar."""
    return tqdm(items, total=total, desc=what, unit=unit, file=sys.stderr, disable=_silent(), mininterval=0.5)


def _silent() -> bool:
    forced = os.environ.get("DOUBLE11_PROGRESS")
    return forced == "0" if forced is not None else not sys.stderr.isatty()
