"""How many events a second EventService takes, from all and from each tenant: token buckets.

Source: Tanenbaum & Wetherall, Computer Networks, 5.4.2 (token bucket). A bucket may be overdrawn by one batch, so that
a batch larger than the bucket passes once it is full.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from recsys.serving.config import PublishConfig


class TokenBucket:
    """`rate_per_s` tokens a second, at most `size` of them kept."""

    def __init__(self, rate_per_s: float, size: float, now_s: Callable[[], float]) -> None:
        self._rate_per_s, self._size, self._now_s = rate_per_s, size, now_s
        self._tokens, self._at_s = size, now_s()

    def wait_s(self, wanted: int) -> float:
        """Seconds until `wanted` can be taken; 0 = now."""
        now_s = self._now_s()
        self._tokens = min(self._size, self._tokens + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        return max(0.0, (min(wanted, self._size) - self._tokens) / self._rate_per_s)

    def take(self, wanted: int) -> None:
        """Take them; ask `wait_s` first."""
        self._tokens -= wanted


class PublishLimiter:
    """One bucket for the process and one for each of the tenants seen last."""

    def __init__(self, config: PublishConfig, now_s: Callable[[], float] = time.monotonic) -> None:
        self._config, self._now_s = config, now_s
        self._all = self._bucket(config.events_per_s_max)
        self._tenants: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, tenant: str, num_events: int) -> float:
        """0.0 when the events may pass; else the seconds until they may, and nothing is taken."""
        buckets = [b for b in (self._all, self._of(tenant)) if b is not None]
        wait_s = max((b.wait_s(num_events) for b in buckets), default=0.0)
        if not wait_s:
            for bucket in buckets:
                bucket.take(num_events)
        return wait_s

    def _of(self, tenant: str) -> TokenBucket | None:
        """The tenant's bucket; the one not heard of for longest makes room."""
        bucket = self._tenants.get(tenant) or self._bucket(self._config.tenant_events_per_s_max)
        if bucket is not None:
            self._tenants[tenant] = bucket
            self._tenants.move_to_end(tenant)
            if len(self._tenants) > self._config.tenants_max:
                self._tenants.popitem(last=False)
        return bucket

    def _bucket(self, rate_per_s: float) -> TokenBucket | None:
        return TokenBucket(rate_per_s, rate_per_s * self._config.burst_s, self._now_s) if rate_per_s else None
