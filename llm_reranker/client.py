"""A Reranker that is another process: RerankService over gRPC. Light: no torch.

The remaining time travels as the gRPC timeout. No retries: the pipeline takes the ranker's order instead. Several
workers are one target, "ipv4:127.0.0.1:7001,127.0.0.1:7002" or "dns:///rerank:50053".
"""

from __future__ import annotations

import grpc
import numpy as np
from double11.v1 import rerank_pb2_grpc as pb_grpc

from llm_reranker import messages
from llm_reranker.base import RerankRequest, RerankResult
from llm_reranker.lists import FEATURE_NAMES
from recsys.core.deadline import Deadline
from recsys.core.errors import (
    BadInput,
    DeadlineExceeded,
    Double11Error,
    Internal,
    Overloaded,
    Unavailable,
    VersionMismatch,
)
from recsys.core.rpc import TO_WORKERS

_ERRORS: dict[grpc.StatusCode, type[Double11Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadInput,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: VersionMismatch,
    grpc.StatusCode.INTERNAL: Internal,
}


class RemoteReranker:
    """Implements Reranker with the server at `target`."""

    def __init__(self, target: str, *, version: str = "", feature_names: tuple[str, ...] = FEATURE_NAMES) -> None:
        """version: the one wanted; "" = whichever the server serves. feature_names: of that version's double11.json."""
        self._target, self._wanted, self._version, self._feature_names = target, version, version, feature_names
        self._channel: grpc.aio.Channel | None = None

    @property
    def version(self) -> str:
        """Version that answered last; before that the one asked for."""
        return self._version

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Candidate features the model wants."""
        return self._feature_names

    async def rerank(self, request: RerankRequest, deadline: Deadline) -> RerankResult:
        """Scores for the first `depth` candidates that fit the deadline.

        Raises: BadInput, DeadlineExceeded, Overloaded, VersionMismatch, Unavailable (also for senseless scores).
        """
        messages.check_count(len(request.item_ids))
        if len(request.texts) != len(request.item_ids) or len(request.features) != len(request.item_ids):
            raise BadInput(
                "rerank candidates",
                came=f"{len(request.item_ids)} ids, {len(request.texts)} texts, {len(request.features)} feature rows",
                expected="one of each per candidate",
                fix="Fill texts with empty strings, features with NaN.",
            )
        deadline.require("rerank")
        if self._channel is None:  # here, because a channel belongs to the running loop
            self._channel = grpc.aio.insecure_channel(self._target, options=TO_WORKERS)
        message = messages.to_proto(request)
        message.version = self._wanted
        try:
            answer = await pb_grpc.RerankServiceStub(self._channel).Rerank(message, timeout=deadline.timeout_s())
        except grpc.aio.AioRpcError as error:
            kind = _ERRORS.get(error.code(), Unavailable)
            raise kind(
                f"reranker at {self._target}",
                came=f"{error.code().name} {error.details() or ''}".strip(),
                expected="scores",
                fix="The ranker's order stands meanwhile; see the rerank worker's log.",
            ) from error
        result = messages.result_from_proto(answer)
        n, depth = len(request.item_ids), result.depth
        sensible = len(result.scores) == n and min(n, 1) <= depth <= n  # a depth of none is no answer
        if not sensible or not np.isfinite(result.scores[:depth]).all():
            raise Unavailable(
                f"reranker at {self._target}",
                came=f"{len(result.scores)} scores, depth {depth}",
                expected=f"{n} scores, finite up to a depth of {min(n, 1)} to {n}",
                fix="Restart the rerank worker; if it stays, distil again.",
            )
        self._version = result.version
        return result

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
