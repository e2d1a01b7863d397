"""Children are real processes: they die, come back on the same port, and never outlive their parent."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from recsys.core import Unavailable
from recsys.serving.supervisor import Backoff, ChildSpec, Supervisor

READY = "print('{\"ready\": true}', flush=True)"
SERVE_FOREVER = f"import time; {READY}; time.sleep(600)"
FAST = Backoff(first_s=0.05, max_s=0.2)


@pytest.fixture
async def supervisor():
    made = Supervisor(FAST)
    yield made
    await made.stop(5.0)


async def until(condition, timeout_s=20.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_killed_child_comes_back(supervisor):
    child = supervisor.start(ChildSpec(name="w", argv=["-c", SERVE_FOREVER]))
    assert await supervisor.wait_ready(20.0) == []
    first = child.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: not child.ready.is_set())
    assert "code -9" in child.detail
    await until(child.ready.is_set)
    assert child.pid != first
    assert (child.restarts, child.detail) == (1, "")


async def test_child_that_is_late_is_named(supervisor):
    supervisor.start(ChildSpec(name="slow", argv=["-c", "import time; time.sleep(600)"]))
    assert await supervisor.wait_ready(0.5) == ["slow"]


async def test_child_that_keeps_dying_ends_the_start_and_backs_off(supervisor):
    child = supervisor.start(ChildSpec(name="broken", argv=["-c", "raise SystemExit(2)"]))
    with pytest.raises(Unavailable, match="worker broken: got exited with code 2, restart 3"):
        await supervisor.wait_ready(60.0)
    await asyncio.sleep(1.0)
    assert 3 <= child.restarts <= 15  # pauses .05, .1, .2, .2 ...


async def test_child_that_says_why_it_cannot_serve_ends_the_start_at_once(supervisor):
    told = json.dumps({"error": {"code": "X", "message": "ranker: got tatters.", "fix": "Train again."}})
    child = supervisor.start(ChildSpec(name="w", argv=["-c", f"print({told!r}); raise SystemExit(1)"]))
    supervisor.start(ChildSpec(name="fine", argv=["-c", SERVE_FOREVER]))
    with pytest.raises(Unavailable, match=r"code 1, restart 1: ranker: got tatters\. Train again\."):
        await supervisor.wait_ready(60.0)
    assert child.restarts == 1


@pytest.mark.parametrize("says_ready", [True, False])
async def test_child_that_served_says_why_it_ended(supervisor, says_ready):
    told = json.dumps({"error": {"code": "X", "message": "store: got away.", "fix": "Start it."}})
    argv = ["-c", f"{READY}; print({told!r}); raise SystemExit(4)"]
    child = supervisor.start(ChildSpec(name="w", argv=argv, says_ready=says_ready))
    await until(lambda: child.restarts == 1)
    assert child.detail == "exited with code 4, restart 1: store: got away. Start it."
    assert not child.hopeless


async def test_child_says_what_it_does_and_whether_that_is_less_than_it_should(supervisor):
    told = json.dumps({"detail": "stopped", "degraded": True})
    child = supervisor.start(ChildSpec(name="w", argv=["-c", f"print({told!r}, flush=True); {SERVE_FOREVER}"]))
    assert child.state == "down"
    await supervisor.wait_ready(20.0)
    assert (child.state, child.detail) == ("degraded", "stopped")


async def test_child_that_has_served_may_die_as_often_as_it_likes(supervisor):
    child = supervisor.start(ChildSpec(name="w", argv=["-c", READY]))
    await until(lambda: child.restarts >= 5)
    assert not child.hopeless


async def test_chatty_child_is_read_and_only_the_ready_line_counts(supervisor):
    chatty = (
        f"print('x' * 300_000, flush=True); print('[1]'); {READY}; print('y' * 300_000, flush=True); {SERVE_FOREVER}"
    )
    supervisor.start(ChildSpec(name="chatty", argv=["-c", chatty]))
    assert await supervisor.wait_ready(20.0) == []


async def test_stop_is_sigterm_first_then_sigkill(supervisor):
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SERVE_FOREVER}"
    polite = supervisor.start(ChildSpec(name="polite", argv=["-c", SERVE_FOREVER]))
    stubborn = supervisor.start(ChildSpec(name="stubborn", argv=["-c", deaf]))
    await supervisor.wait_ready(20.0)
    began_s = time.monotonic()
    await supervisor.stop(0.5)
    assert time.monotonic() - began_s < 5
    assert not psutil.pid_exists(polite.pid)
    assert not psutil.pid_exists(stubborn.pid)


async def test_port_is_kept_over_a_restart(supervisor):
    address = supervisor.reserve_port()
    host, port = address.split(":")
    listener = (
        "import socket, time; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); "
        f"s.bind(({host!r}, {port})); s.listen(); {READY}; time.sleep(600)"
    )
    child = supervisor.start(ChildSpec(name="listener", argv=["-c", listener]))
    await supervisor.wait_ready(20.0)
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: child.restarts == 1 and child.ready.is_set())
    _, writer = await asyncio.open_connection(host, int(port))
    writer.close()


def test_children_die_with_a_parent_that_is_killed():
    parent = (
        "import asyncio, sys\n"
        "from recsys.core import logging\n"
        "from recsys.serving.supervisor import Backoff, ChildSpec, Supervisor\n"
        "logging.configure()\n"
        "async def main():\n"
        "    s = Supervisor(Backoff(first_s=1, max_s=1))\n"
        f"    c = s.start(ChildSpec(name='w', argv=['-c', {SERVE_FOREVER!r}]))\n"
        "    await s.wait_ready(20)\n"
        "    print(c.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.communicate()
    for _ in range(200):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError(f"child {child} outlived its parent")
