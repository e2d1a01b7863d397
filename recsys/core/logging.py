"""Key-value logs on stderr with static event names; structlog does the work."""

from __future__ import annotations

import logging
import sys
from typing import Any, cast

import structlog

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str = "INFO", *, json: bool = False) -> None:
    """Set up logging once per process. json=True prints one JSON object per line for log shippers."""
    renderer: Any = structlog.processors.JSONRenderer() if json else structlog.processors.LogfmtRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        # Found at each call: a test's or a daemon's stderr may be another one by then.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger bound to its module. The first argument of each call is a static event name."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(module=name))
