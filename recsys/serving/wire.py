"""What every gRPC server of ours does at the wire: errors to statuses, undecodable bytes to INVALID_ARGUMENT.

gRPC Python answers INTERNAL or UNKNOWN in both cases, which tells the caller nothing. One server interceptor mends it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from recsys.core import BadInput, Deadline, Double11Error, Overloaded, logging

_PUSHBACK = "grpc-retry-pushback-ms"  # gRFC A6; -1: a client must not retry
_log = logging.get_logger(__name__)


class _Malformed:
    """Stands for a request whose bytes are not the message they should be."""

    def __init__(self, error: str) -> None:
        self.error = error


class WireInterceptor(grpc.aio.ServerInterceptor):
    """Turns Double11Error into its gRPC status, and bytes that do not parse into INVALID_ARGUMENT.

    Overloaded carries the trailing metadata grpc-retry-pushback-ms, -1 unless the error names a time.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, wrapped; streaming responses (health, reflection) pass untouched."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.response_streaming:
            return handler
        method = str(handler_call_details.method)
        parse = _tolerant(handler.request_deserializer)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                _answering(handler.stream_unary, method, _checked_stream), parse, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _answering(handler.unary_unary, method, _checked), parse, handler.response_serializer
        )


def deadline_of(context: grpc.aio.ServicerContext[Any, Any], default_ms: float, max_ms: float) -> Deadline:
    """The one Deadline of a call, made at receipt: the client's remaining time, capped, or the default."""
    remaining_s = context.time_remaining()
    return Deadline.after_ms(default_ms if remaining_s is None else min(remaining_s * 1e3, max_ms))


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return _Malformed(f"{len(data)} bytes that do not parse ({error})")

    return parsed


def _checked(request: Any, method: str) -> Any:
    if isinstance(request, _Malformed):
        raise BadInput(
            method,
            came=request.error,
            expected="the request message of protos/double11/v1",
            fix="Regenerate the stubs.",
        )
    return request


async def _checked_stream(requests: AsyncIterator[Any], method: str) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request, method)


def _answering(behaviour: Callable[..., Any], method: str, check: Callable[[Any, str], Any]) -> Callable[..., Any]:
    async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(check(request, method), context)
        except Double11Error as error:
            if error.grpc_status in ("INTERNAL", "DATA_LOSS"):
                _log.error("rpc_failed", method=method, error=str(error))
            await _abort(context, error)

    return answer


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Double11Error) -> NoReturn:
    trailing = tuple(context.trailing_metadata() or ())
    if isinstance(error, Overloaded):
        trailing += ((_PUSHBACK, str(error.retry_after_ms)),)
    await context.abort(getattr(grpc.StatusCode, error.grpc_status), str(error), trailing)
    raise AssertionError("abort raises")
