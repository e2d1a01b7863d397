"""What libraries say when the disk refuses a file, in the system's words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polars.exceptions import ComputeError
from safetensors import SafetensorError


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Around what writes with safetensors or polars. Raises: OSError where they raise an error of their own."""
    try:
        yield
    except (SafetensorError, ComputeError) as error:
        refused = re.search(r"\(os error (\d+)\)", str(error))
        if refused is None:
            raise
        number = int(refused[1])
        raise OSError(number, os.strerror(number), str(path)) from error
