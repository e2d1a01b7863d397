"""How functions are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile at the first call; keep the machine code where there is a folder that can be written."""
    try:
        found: _Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # there is none
        found = numba.njit(nogil=True, error_model="numpy")(function)
    return found
