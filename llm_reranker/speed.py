"""How long a batch will take: fixed cost + cost per token, measured at start-up, times how busy the machine is now."""

from __future__ import annotations

import math
import sys

_SMOOTHING = 0.2
_FACTOR_MIN, _FACTOR_MAX = 0.01, 50.0
_RECOVERY = 0.9
_DEADLINE_SHARE = 0.8  # of the remaining time may be planned; the rest is for noise and the way back


class SpeedModel:
    """ms(tokens) = factor x (fixed_ms + token_ms x tokens)."""

    def __init__(self, fixed_ms: float = 1.0, token_ms: float = 0.05) -> None:
        self.fixed_ms, self.token_ms, self.factor = fixed_ms, token_ms, 1.0

    @classmethod
    def from_two(cls, small: tuple[int, float], large: tuple[int, float]) -> SpeedModel:
        """The line through two measured (tokens, ms)."""
        token_ms = max(1e-5, (large[1] - small[1]) / max(1, large[0] - small[0]))
        return cls(max(0.0, small[1] - token_ms * small[0]), token_ms)

    def affordable_tokens(self, remaining_ms: float) -> int:
        """Tokens that fit the remaining time; 0 or less when not even an empty batch does."""
        if math.isinf(remaining_ms):
            return sys.maxsize
        room_ms = remaining_ms * _DEADLINE_SHARE / self.factor - self.fixed_ms
        return math.floor(room_ms / self.token_ms)

    def observe(self, tokens: int, ms: float) -> None:
        """Learn from a batch that was computed."""
        seen = ms / (self.fixed_ms + self.token_ms * tokens)
        self.factor += _SMOOTHING * (seen - self.factor)
        self.factor = min(_FACTOR_MAX, max(_FACTOR_MIN, self.factor))

    def refused(self) -> None:
        """A refusal computes nothing and so teaches nothing: let the estimate recover, or it would refuse forever."""
        self.factor = max(_FACTOR_MIN, self.factor * _RECOVERY)
