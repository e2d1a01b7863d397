"""Trace: what happened to one request, stage by stage, and why it fell through where it did.

Health: how the stages answered last, whoever asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from recsys.core import Deadline, DeadlineExceeded, Double11Error, StageTiming
from recsys.core.metrics import FALLBACKS, STAGE_MS

T = TypeVar("T")


class Health:
    """How the stages of a cascade answered when they were asked last, for operators."""

    def __init__(self) -> None:
        self._asked = set[str]()
        self._failing: dict[str, tuple[float, str]] = {}  # since when, of the monotonic clock, and what came last

    def note(self, stage: str, failed: str = "") -> None:
        """A stage was asked. failed: why it gave nothing, "" when it answered."""
        self._asked.add(stage)
        since_s, _ = self._failing.pop(stage, (time.monotonic(), ""))
        if failed:
            self._failing[stage] = since_s, failed

    def of(self, *stages: str) -> tuple[bool, str]:
        """Whether all of these that were asked answered, and for people: what is wrong and since when."""
        wrong = [(*self._failing[s], s) for s in stages if s in self._failing]
        if not wrong:
            return True, "" if self._asked.intersection(stages) else "not asked yet"
        since_s, failed, stage = min(wrong)
        return False, f"for {time.monotonic() - since_s:.0f} s: {stage}: {failed}"


class Trace:
    """Collects timings and fallbacks, each of which also counts in a metric, and the versions that answered."""

    def __init__(self, health: Health | None = None) -> None:
        """health: told of every stage, too."""
        self._health = health or Health()
        self.timings: list[StageTiming] = []
        self.fallbacks: list[str] = []
        self.versions: dict[str, str] = {}
        self._receipt_s = time.monotonic()

    async def attempt(self, stage: str, deadline: Deadline, work: Awaitable[T], items_in: int = 0) -> T | None:
        """Await one stage inside its deadline; None when it failed or took too long, which is counted.

        Only errors of our tree and time-outs fall through: anything else is a bug and travels up.
        """
        start_s, outcome, result, failed = time.monotonic(), "ok", None, ""
        try:
            async with asyncio.timeout(deadline.timeout_s()):
                result = await work
        except (TimeoutError, DeadlineExceeded) as error:
            outcome, failed = "timeout", str(error) or "no answer in time"
            self.fell_through(stage, "timeout")
        except Double11Error as error:
            outcome, failed = "error", str(error)
            self.fell_through(stage, error.code.lower().replace("_", "-"))
        finally:
            self.done(stage, start_s, outcome, items_in, _size(result))
        self._health.note(stage, failed)
        return result

    def done(self, stage: str, start_s: float, outcome: str, items_in: int, items_out: int) -> None:
        """Note a finished stage that began at `start_s` on the monotonic clock."""
        duration_ms = (time.monotonic() - start_s) * 1e3
        self.timings.append(
            StageTiming(
                stage=stage,
                start_ms=(start_s - self._receipt_s) * 1e3,
                duration_ms=duration_ms,
                outcome=outcome,
                items_in=items_in,
                items_out=items_out,
            )
        )
        STAGE_MS.labels(stage, outcome).observe(duration_ms)

    def fell_through(self, stage: str, reason: str) -> None:
        """Note and count why a stage's result is not used."""
        self.fallbacks.append(f"{stage}:{reason}")
        FALLBACKS.labels(stage, reason).inc()


def _size(result: Any) -> int:
    return len(result) if hasattr(result, "__len__") else 0
