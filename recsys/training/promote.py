"""Choose the run that serves: `$DOUBLE11_HOME/runs/current`, a link replaced in one step. Light."""

from __future__ import annotations

import os
from pathlib import Path

from recsys.core import NotFound, RunDirectory


def current_link() -> Path:
    """Where the link lies: below DOUBLE11_HOME, else ./.double11."""
    return Path(os.environ.get("DOUBLE11_HOME") or ".double11") / "runs" / "current"


def current_run() -> Path:
    """The run that was promoted last.

    Raises: NotFound when none was.
    """
    link = current_link()
    if not link.exists():
        raise NotFound("--run", came="no option, and no run promoted", expected="one of both",
                       fix="Pass --run RUN, or choose one: double11 promote RUN.")  # fmt: skip
    return link


def promote(run: Path | str) -> Path:
    """Point `current` at the run, after every file of it has been checked. Returns the link.

    A reader sees the old run or the new one.
    Raises: NotFound, CorruptData, VersionMismatch for a run that is not whole.
    """
    root = RunDirectory.open(run).root.resolve()
    link = current_link()
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".current.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    # Relative, so that the folder can be mounted elsewhere (on Kubernetes: one claim, another path in every pod).
    temporary.symlink_to(os.path.relpath(root, link.parent.resolve()), target_is_directory=True)
    temporary.rename(link)
    return link
