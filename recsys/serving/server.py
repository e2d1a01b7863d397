"""A grpc.aio server as all our processes run it: errors on the wire, health, reflection, drain.

Health is NOT_SERVING until `set_serving(True)`. `drain` says NOT_SERVING first, so that balancers look away, then
refuses new calls and gives those in flight up to `drain_s_max`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from recsys.core import BadInput, Unavailable
from recsys.core.rpc import SERVER
from recsys.serving.wire import WireInterceptor

_RECEIVE_BYTES_MAX = 4 << 20
_PORT_MAX = 65_535
_LAST_WORD_S = 0.1


class Server:
    """One listener. Add servicers to `.grpc`, then `start`."""

    def __init__(self, drain_s_max: float, *, share_port: bool = False) -> None:
        """share_port: bind a port that another socket holds too; see supervisor.ReservedPort."""
        mine = (("grpc.max_receive_message_length", _RECEIVE_BYTES_MAX), ("grpc.so_reuseport", int(share_port)))
        self.grpc = grpc.aio.server(interceptors=(WireInterceptor(),), options=(*SERVER, *mine))
        self._drain_s_max = drain_s_max
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._names: tuple[str, ...] = ("",)

    async def start(
        self, listen: str, services: Sequence[str], credentials: grpc.ServerCredentials | None = None
    ) -> int:
        """Bind and listen; returns the port. `services`: full names for health and reflection. No credentials: no TLS.

        Raises: BadInput for an address that is not HOST:PORT; Unavailable when it is taken.
        """
        check_address(listen)
        self._names = ("", *services)
        await self.set_serving(False)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc)
        try:
            if credentials is None:
                bound: int = self.grpc.add_insecure_port(listen)
            else:
                bound = self.grpc.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise Unavailable(
                f"--listen {listen}", came=str(error), expected="a free address of this host", fix="Choose another."
            ) from error
        await self.grpc.start()
        return bound

    async def set_serving(self, serving: bool) -> None:
        """Set health for the whole server and each of its services."""
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def drain(self) -> None:
        """NOT_SERVING at once, in-flight calls finished or cut off after `drain_s_max`."""
        await self._health.enter_graceful_shutdown()
        self._health.end_watches()
        await self.grpc.stop(self._drain_s_max)


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Health whose streams end with the server: one that nobody ends would cost every drain its whole time."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[None]] = set()

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """A status now and after every change, until the client goes or the server drains."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.gather(watch, return_exceptions=True)
        finally:
            self._watches.discard(watch)

    def end_watches(self) -> None:
        """Let every stream say what it last heard, and end."""
        for watch in self._watches:
            asyncio.get_running_loop().call_later(_LAST_WORD_S, watch.cancel)


def stop_signal() -> asyncio.Event:
    """An event of the running loop that SIGTERM and SIGINT set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def check_address(listen: str) -> None:
    """Raises: BadInput unless it is HOST:PORT."""
    host, colon, port = listen.rpartition(":")
    # gRPC would take a port above that, less 65,536.
    if not (host and colon and port.isascii() and port.isdigit() and int(port) <= _PORT_MAX):
        expected = f"HOST:PORT, a port of at most {_PORT_MAX}"
        raise BadInput("--listen", came=listen, expected=expected, fix="Write e.g. 127.0.0.1:50051.")


def on_loopback(listen: str) -> bool:
    """Whether an address HOST:PORT can be reached from this host only. Raises: BadInput for another form."""
    check_address(listen)
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
