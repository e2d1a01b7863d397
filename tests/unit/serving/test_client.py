"""The client-side throttle of the SRE book, and what the clients say about a server that does not answer."""

import socket

import numpy as np
import pytest

from recsys.core import DeadlineExceeded, Overloaded, Unavailable
from recsys.serving.client import AdminClient, RecommendClient, Throttle
from recsys.serving.config import ClientConfig


class Now:
    def __init__(self):
        self.s = 100.0

    def __call__(self):
        return self.s


def throttle(now, ratio=2.0, window_s=10):
    return Throttle(ClientConfig(throttle_ratio=ratio, throttle_window_s=window_s), np.random.default_rng(0), now)


def test_never_refuses_while_the_server_accepts():
    t = throttle(Now())
    for _ in range(1_000):
        assert not t.refuses()
        t.accepted()


def test_chance_follows_the_formula_and_falls_with_time():
    now = Now()
    t = throttle(now)
    for _ in range(100):
        t.refuses()
    for _ in range(20):
        t.accepted()
    assert t.refuse_chance() == pytest.approx((100 - 2 * 20) / 101)
    now.s += 11
    assert t.refuse_chance() == 0


def test_ratio_zero_is_off():
    t = throttle(Now(), ratio=0)
    assert not any(t.refuses() for _ in range(100))


async def test_unreachable_server_is_unavailable_then_throttled():
    async with RecommendClient("127.0.0.1:9", rng=np.random.default_rng(0)) as client:
        errors = []
        for _ in range(30):
            with pytest.raises((Unavailable, Overloaded)) as caught:
                await client.recommend("u", deadline_ms=500)
            errors.append(caught.value)
        assert isinstance(errors[0], Unavailable)
        assert "double11 serve" in errors[0].fix
        assert any(isinstance(error, Overloaded) for error in errors)


async def test_a_server_that_does_not_answer_in_time_is_said_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with AdminClient(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.05) as client:
            with pytest.raises(DeadlineExceeded) as caught:
                await client.status()
    assert "double11 status" in caught.value.fix
