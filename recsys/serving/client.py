"""Client library for storefronts: a deadline on every call, no retries of refusals, a client-side throttle.

Source: Google SRE book, ch. 21 "Handling Overload", client-side throttling:
p(reject locally) = max(0, (requests - K * accepts) / (requests + 1)).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
import numpy as np
from double11.v1 import admin_pb2, admin_pb2_grpc
from double11.v1 import recommend_pb2 as pb
from double11.v1 import recommend_pb2_grpc as pb_grpc

from recsys.core import (
    BadInput,
    DeadlineExceeded,
    Double11Error,
    Internal,
    NotFound,
    Overloaded,
    Unavailable,
    VersionMismatch,
)
from recsys.core.rpc import BALANCED, KEEPALIVE
from recsys.serving.config import ClientConfig

_ERRORS: dict[grpc.StatusCode, type[Double11Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadInput,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: VersionMismatch,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}
T = TypeVar("T")
_REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


class Throttle:
    """Refuses locally what the server would refuse anyway, so that its time goes to work and not to refusals."""

    def __init__(self, config: ClientConfig, rng: np.random.Generator, now_s: Callable[[], float]) -> None:
        self._ratio, self._rng, self._now_s = config.throttle_ratio, rng, now_s
        self._seconds: deque[list[int]] = deque(maxlen=config.throttle_window_s)  # [second, requests, accepts]
        self._window_s = config.throttle_window_s

    def refuse_chance(self) -> float:
        """Probability that the next call is refused here."""
        if self._ratio == 0:
            return 0.0
        oldest = int(self._now_s()) - self._window_s
        while self._seconds and self._seconds[0][0] <= oldest:
            self._seconds.popleft()
        requests, accepts = sum(s[1] for s in self._seconds), sum(s[2] for s in self._seconds)
        return max(0.0, (requests - self._ratio * accepts) / (requests + 1))

    def refuses(self) -> bool:
        """Whether to refuse this call; it is counted as a request either way, as accepted by `accepted`."""
        refused = bool(self._rng.random() < self.refuse_chance())
        self._second()[1] += 1
        return refused

    def accepted(self) -> None:
        """The server took the call."""
        self._second()[2] += 1

    def _second(self) -> list[int]:
        now = int(self._now_s())
        if not self._seconds or self._seconds[-1][0] != now:
            self._seconds.append([now, 0, 0])
        return self._seconds[-1]


class RecommendClient:
    """Calls RecommendationService. An async context manager; for one event loop."""

    def __init__(
        self,
        target: str,
        config: ClientConfig | None = None,
        *,
        rng: np.random.Generator | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """target: HOST:PORT or any gRPC target; calls go round all its addresses.

        Raises: BadInput for files of the configuration.
        """
        config = config or ClientConfig()
        self.target = target
        self._channel = _channel(target, config)
        self._stub = pb_grpc.RecommendationServiceStub(self._channel)
        self._throttle = Throttle(config, rng or np.random.default_rng(), now_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def recommend(
        self,
        user_id: str,
        *,
        limit: int = 10,
        deadline_ms: float = 200.0,
        surface: str = "",
        exclude: Sequence[str] = (),
        new_only: bool = False,
        stress: bool = False,
        item_filter: pb.ItemFilter | None = None,
    ) -> pb.RecommendResponse:
        """A slate for a user. For fields not named here, use `call` with a RecommendRequest.

        Raises: as `call`.
        """
        request = pb.RecommendRequest(
            user_id=user_id, limit=limit, surface=surface, exclude_item_ids=exclude, new_only=new_only, stress=stress,
            filter=item_filter,
        )  # fmt: skip
        return await self.call(request, deadline_ms=deadline_ms)

    async def call(self, request: pb.RecommendRequest, *, deadline_ms: float) -> pb.RecommendResponse:
        """Send one request, once.

        Raises: BadInput, VersionMismatch, DeadlineExceeded, Overloaded (by the server or the throttle), Unavailable,
        Internal.
        """
        if self._throttle.refuses():
            raise Overloaded(
                f"Recommend at {self.target}",
                came="most recent calls were refused by the server",
                expected="a server that accepts",
                fix="Show what the page has; the client tries again by itself with a falling chance.",
            )
        try:
            response: pb.RecommendResponse = await self._stub.Recommend(request, timeout=deadline_ms / 1e3)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _REFUSALS:
                self._throttle.accepted()
            raise _as_ours("Recommend", self.target, error) from error
        self._throttle.accepted()
        return response


class AdminClient:
    """Calls AdminService. An async context manager."""

    def __init__(self, target: str, config: ClientConfig | None = None, *, timeout_s: float = 10.0) -> None:
        """target: HOST:PORT of the gateway's AdminService. Raises: BadInput for files of the configuration."""
        self.target, self._timeout_s = target, timeout_s
        self._channel = _channel(target, config or ClientConfig())
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def status(self) -> admin_pb2.GetStatusResponse:
        """The state of the gateway. Raises: Unavailable, DeadlineExceeded."""
        return await self._answer(self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=self._timeout_s))

    async def peak(self) -> admin_pb2.GetPeakResponse:
        """The prepared plans and the active one. Raises: Unavailable, DeadlineExceeded."""
        return await self._answer(self._stub.GetPeak(admin_pb2.GetPeakRequest(), timeout=self._timeout_s))

    async def activate(self, name: str) -> admin_pb2.ActivatePeakResponse:
        """Put a plan in force. Raises: NotFound, Unavailable, DeadlineExceeded."""
        request = admin_pb2.ActivatePeakRequest(name=name)
        return await self._answer(self._stub.ActivatePeak(request, timeout=self._timeout_s))

    async def revert(self) -> admin_pb2.RevertPeakResponse:
        """Back to the configuration. Raises: Unavailable, DeadlineExceeded."""
        return await self._answer(self._stub.RevertPeak(admin_pb2.RevertPeakRequest(), timeout=self._timeout_s))

    async def _answer(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise _as_ours("AdminService", self.target, error) from error


def _channel(target: str, config: ClientConfig) -> grpc.aio.Channel:
    """Over TLS where the configuration says who signs the gateway's certificate."""
    if config.ca_file is None:
        return grpc.aio.insecure_channel(target, options=(*KEEPALIVE, BALANCED))
    files = {"root_certificates": config.ca_file, "private_key": config.key_file, "certificate_chain": config.cert_file}
    read = {name: _read(path) for name, path in files.items() if path is not None}
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(**read), options=(*KEEPALIVE, BALANCED))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"[serving.client] {path}",
            came=error.strerror or type(error).__name__,
            expected="a PEM file that can be read",
            fix="Correct the path or the file's mode.",
        ) from error


def _as_ours(what: str, target: str, error: grpc.aio.AioRpcError) -> Double11Error:
    kind, details = _ERRORS.get(error.code(), Internal), error.details() or ""
    if kind is Unavailable:  # nobody there: the words are gRPC's, not those of a server of ours
        fix = "Start one (double11 serve), or correct the address."
        return Unavailable(f"{what} at {target}", came=f"UNAVAILABLE ({details})", expected="a gateway", fix=fix)
    # our servers' details end with what to do; gRPC's own words, e.g. "Deadline Exceeded", are no sentence
    fix = details if details.endswith(".") else f"Allow it more time, or look at: double11 status --target {target}"
    return kind(f"{what} at {target}", came=error.code().name, expected="an answer", fix=fix)
