"""Child processes of one host: started, watched, restarted with backoff, stopped together.

A child that serves gRPC keeps one port for its whole life, restarts included: the supervisor holds the port bound,
not listening, with SO_REUSEPORT, and the child binds it too. So channels need no new address after a restart.
Source of the trick: grpc/grpc examples/python/multiprocessing/server.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from recsys.core import Unavailable, logging, metrics

_log = logging.get_logger(__name__)
# The kernel tells the child when its parent dies, however it dies; set between fork and exec of the real program.
_PR_SET_PDEATHSIG, _SIGTERM = 1, 15
_TIE_TO_PARENT = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {_SIGTERM}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class ReservedPort:
    """A loopback port that stays ours until `close`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildSpec:
    """A child: arguments of this interpreter ("-m", module, ...).

    says_ready: it prints a JSON line with "ready" on stdout once it serves; others count as ready when started. A line
    with "detail" says what it does, and "degraded" whether that is less than it should.
    One that cannot serve, or go on, prints an error of ours, `{"error": {"message", "fix"}}`, and exits.
    """

    name: str
    argv: Sequence[str]
    says_ready: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """Pause before a restart, seconds: from `first_s`, doubled up to `max_s`, back to `first_s` after a long life."""

    first_s: float
    max_s: float


class Child:
    """One supervised process."""

    def __init__(self, spec: ChildSpec, backoff: Backoff, deaths_max: int, on_hopeless: Callable[[], object]) -> None:
        """on_hopeless: called when it has died deaths_max times, or said why it cannot serve, before it ever did."""
        self.spec = spec
        self.ready = asyncio.Event()
        self.pid: int | None = None
        self.restarts = 0
        self.detail = "starting"
        self.hopeless = self.degraded = False
        self._backoff, self._deaths_max, self._on_hopeless = backoff, deaths_max, on_hopeless
        self._served, self._error, self._doing = not spec.says_ready, "", ""
        self._process: asyncio.subprocess.Process | None = None
        self._task = asyncio.create_task(self._keep_running())

    @property
    def state(self) -> str:
        """For AdminService."""
        return "down" if not self.ready.is_set() else "degraded" if self.degraded else "ok"

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after `timeout_s`."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
        # Until exit and to the end of its output: only then has asyncio let go of the pipe.
        try:
            await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            _log.warning("child_killed", child=self.spec.name, after_s=timeout_s)
            if process.returncode is None:
                process.kill()
            with suppress(TimeoutError):  # a grandchild may hold the pipe for ever
                await asyncio.wait_for(process.communicate(), timeout_s)

    async def _keep_running(self) -> None:
        pause_s = self._backoff.first_s
        while True:
            started_s = time.monotonic()
            try:
                code = str(await self._run_once())
            except OSError as error:  # no memory or no process ids left on this host
                code = f"none, it could not be started: {error}"
            self.ready.clear()
            if time.monotonic() - started_s > 2 * self._backoff.max_s:
                pause_s = self._backoff.first_s
            self.restarts += 1
            metrics.WORKER_RESTARTS.labels(self.spec.name).inc()
            self.detail = f"exited with code {code}, restart {self.restarts}" + (self._error and f": {self._error}")
            _log.error(
                "child_died", child=self.spec.name, code=code, restart=self.restarts, in_s=pause_s, error=self._error
            )
            if not self._served and (self._error or self.restarts >= self._deaths_max):
                self.hopeless = True
                self._on_hopeless()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._backoff.max_s)

    async def _run_once(self) -> int:
        self._error, self.degraded = "", False
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-SEc",
            _TIE_TO_PARENT,
            *self.spec.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        self.pid = process.pid
        _log.info("child_started", child=self.spec.name, pid=process.pid)
        self._doing = ""
        if not self.spec.says_ready:
            self._now_ready()
        assert process.stdout is not None
        while line := await _next_line(process.stdout):  # to the end: a full pipe would block the child
            told = _document(line)
            if isinstance(detail := told.get("detail"), str):
                self._doing, self.degraded = detail, told.get("degraded") is True
                self.detail = detail if self.ready.is_set() else self.detail
            elif isinstance(error := told.get("error"), dict):
                self._error = f"{error.get('message', '')} {error.get('fix', '')}".strip()
            elif told.get("ready") and not self.ready.is_set():
                self._now_ready()
        return await process.wait()

    def _now_ready(self) -> None:
        self.detail, self._served = self._doing, True
        self.ready.set()
        _log.info("child_ready", child=self.spec.name, pid=self.pid)


class Supervisor:
    """The children of one gateway. Use inside a running event loop."""

    def __init__(self, backoff: Backoff, start_deaths_max: int = 3) -> None:
        """start_deaths_max: deaths before it ever served after which a child is given up for the start."""
        self._backoff, self._start_deaths_max = backoff, start_deaths_max
        self._hopeless = asyncio.Event()
        self._ports: list[ReservedPort] = []
        self.children: list[Child] = []

    def reserve_port(self) -> str:
        """A loopback address for a child to listen on, kept until `stop`."""
        self._ports.append(ReservedPort())
        return self._ports[-1].address

    def start(self, spec: ChildSpec) -> Child:
        """Start a child and keep it running."""
        self.children.append(Child(spec, self._backoff, self._start_deaths_max, self._hopeless.set))
        return self.children[-1]

    async def wait_ready(self, timeout_s: float) -> list[str]:
        """Wait until every child is ready; returns the names of those that are not after `timeout_s`.

        Raises: Unavailable, with the reason, as soon as one cannot serve: waiting on would not mend it.
        """
        all_ready = asyncio.create_task(self._all_ready())
        hopeless = asyncio.create_task(self._hopeless.wait())
        try:
            await asyncio.wait({all_ready, hopeless}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            all_ready.cancel()
            hopeless.cancel()
        for child in self.children:
            if child.hopeless:
                raise Unavailable(
                    f"worker {child.spec.name}",
                    came=child.detail,
                    expected="one that loads and serves",
                    fix="Mend what it says, or see its lines in the log above; then start again.",
                )
        return [c.spec.name for c in self.children if not c.ready.is_set()]

    async def _all_ready(self) -> None:
        for child in self.children:
            await child.ready.wait()

    async def stop(self, timeout_s: float) -> None:
        """Stop all children at once and give the ports back."""
        await asyncio.gather(*(child.stop(timeout_s) for child in self.children))
        for port in self._ports:
            port.close()


async def _next_line(stdout: asyncio.StreamReader) -> bytes:
    try:
        return await stdout.readline()
    except ValueError:  # longer than the reader's limit, so not the ready line; the reader has dropped it
        return b"\n"


def _document(line: bytes) -> dict[str, object]:
    """The JSON object on a line, {} where there is none."""
    try:
        document = json.loads(line)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
