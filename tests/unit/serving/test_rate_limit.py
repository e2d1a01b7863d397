"""Token buckets of EventService: the process's, the tenants', and what is remembered."""

import pytest

from recsys.core import BadInput
from recsys.core.config import Config
from recsys.serving.config import PublishConfig
from recsys.serving.rate_limit import PublishLimiter


class Clock:
    def __init__(self):
        self.at_s = 100.0

    def __call__(self):
        return self.at_s


@pytest.fixture
def clock():
    return Clock()


def test_a_burst_passes_and_the_rest_waits_for_the_rate(clock):
    limiter = PublishLimiter(PublishConfig(events_per_s_max=100, burst_s=2), clock)
    assert [limiter.take("t", 50) for _ in range(4)] == [0.0] * 4
    assert limiter.take("t", 50) == pytest.approx(0.5)
    clock.at_s += 0.25
    assert limiter.take("t", 50) == pytest.approx(0.25)  # what was refused took nothing
    clock.at_s += 0.25
    assert limiter.take("t", 50) == 0.0


def test_a_batch_larger_than_the_bucket_passes_once_it_is_full_and_is_paid_for_afterwards(clock):
    limiter = PublishLimiter(PublishConfig(events_per_s_max=100, burst_s=1), clock)
    assert limiter.take("t", 300) == 0.0
    assert limiter.take("t", 1) == pytest.approx(2.01)


def test_one_tenant_does_not_take_from_another_but_all_share_the_process(clock):
    config = PublishConfig(events_per_s_max=100, tenant_events_per_s_max=60, burst_s=1)
    limiter = PublishLimiter(config, clock)
    assert limiter.take("a", 60) == 0.0
    assert limiter.take("a", 30) == pytest.approx(0.5)
    assert limiter.take("b", 40) == 0.0
    assert limiter.take("c", 10) == pytest.approx(0.1)


def test_no_limit_and_a_bounded_memory(clock):
    assert PublishLimiter(PublishConfig(events_per_s_max=0), clock).take("t", 10**9) == 0.0
    limiter = PublishLimiter(PublishConfig(events_per_s_max=0, tenant_events_per_s_max=1, tenants_max=2), clock)
    for tenant in "abc":
        assert limiter.take(tenant, 2) == 0.0
    assert limiter.take("c", 1) > 0
    assert limiter.take("a", 1) == 0.0  # forgotten since


@pytest.mark.parametrize(("key", "value"), [("events_per_s_max", -1), ("burst_s", 0), ("tenants_max", 0)])
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(BadInput, match=f"serving.publish.{key}"):
        Config(flags={f"serving.publish.{key}": value}).get(PublishConfig)
