"""One absolute, monotonic deadline per request, made at receipt and passed to every call that waits."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from recsys.core.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on this process's monotonic clock. Between processes only the remaining time travels.

    at_s: `time.monotonic()` seconds, `math.inf` for offline callers.
    """

    at_s: float

    @classmethod
    def after_ms(cls, ms: float) -> Deadline:
        """The deadline `ms` milliseconds from now."""
        return cls(time.monotonic() + ms / 1e3)

    @classmethod
    def never(cls) -> Deadline:
        """For offline callers: replay, training, tests."""
        return cls(math.inf)

    def remaining_ms(self) -> float:
        """Milliseconds left; negative once expired, `inf` for `never`."""
        return (self.at_s - time.monotonic()) * 1e3

    def timeout_s(self) -> float | None:
        """Seconds left, at least 0, in the form asyncio and grpc take: None means no limit."""
        return None if math.isinf(self.at_s) else max(0.0, self.at_s - time.monotonic())

    @property
    def expired(self) -> bool:
        """True once the time is over."""
        return time.monotonic() >= self.at_s

    def capped(self, ms: float) -> Deadline:
        """The earlier of this deadline and `ms` from now. Called only in recsys/pipeline/budget.py."""
        return Deadline(min(self.at_s, time.monotonic() + ms / 1e3))

    def require(self, what: str) -> None:
        """Raise DeadlineExceeded when the time is over.

        Raises: DeadlineExceeded.
        """
        if self.expired:
            raise DeadlineExceeded(
                what,
                came=f"{-self.remaining_ms():.1f} ms past the deadline",
                expected="time left on arrival",
                fix="Send the request with a longer deadline, or drop it: the shopper has gone on.",
            )
