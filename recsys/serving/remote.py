"""The gateway's side of a scoring worker: CandidateSource and Scorer over gRPC. Torch-free.

The remaining time of the request travels as the gRPC timeout; the worker drops what is over. Several workers are one
target, "ipv4:127.0.0.1:7001,127.0.0.1:7002" or "dns:///scoring:50051", and gRPC's round_robin goes round those that
are connected. No retries: the pipeline falls through to the next tier instead.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from typing import TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from double11.v1 import scoring_pb2 as pb
from double11.v1 import scoring_pb2_grpc as pb_grpc

from feature_store import UserFeatures
from recsys.candidates.behaviour import touched
from recsys.core import (
    Candidates,
    Deadline,
    DeadlineExceeded,
    Double11Error,
    Overloaded,
    Query,
    Unavailable,
    VersionMismatch,
)
from recsys.core.attributes import Where
from recsys.ranking import FeatureMatrix

HISTORY_ITEMS_MAX = 512  # of scoring.proto
_OPTIONS = (
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # a restarted worker is found within a second
    ("grpc.max_receive_message_length", 16 << 20),
)
_MISFITS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
T = TypeVar("T")


def open_channel(target: str) -> grpc.aio.Channel:
    """A channel to scoring workers. Plain text: workers listen on loopback or inside the cluster's network."""
    return grpc.aio.insecure_channel(target, options=_OPTIONS)


class RemoteAnnSource:
    """`ann`: the user tower and FAISS, in a worker."""

    name = "ann"
    searches_where = True

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = pb_grpc.ScoringServiceStub(channel)

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """The nearest items to the user's vector; none for a user without history.

        Raises: DeadlineExceeded, Unavailable, Overloaded.
        """
        if not len(user.recent_item_key):
            return Candidates.from_source(self.name, np.empty(0, np.int64), np.empty(0, np.float32))
        item_key, event_type, time_us = _history(user)
        request = pb.RetrieveRequest(
            request_id=query.request_id,
            user_id=query.user_id,
            history_keys=item_key,
            history_types=event_type,
            history_times_us=time_us,
            as_of_us=query.as_of_us,
            limit=limit,
            exclude_keys=touched(user).tolist() if query.new_only else (),
            filter=remote_filter(query.where) if query.where.restricts else None,
        )
        response = await _called("Retrieve", self._stub.Retrieve(request, timeout=deadline.timeout_s()))
        return Candidates.from_source(
            self.name, np.array(response.item_keys, np.int64), np.array(response.scores, np.float32)
        )


class RemoteScorer:
    """The ranker, in a worker."""

    def __init__(self, channel: grpc.aio.Channel, version: str) -> None:
        """version: of the run's ranker, until a worker has said which one it runs."""
        self._stub = pb_grpc.ScoringServiceStub(channel)
        self._version = version

    @property
    def version(self) -> str:
        """Version of the ranker that answered last."""
        return self._version

    async def score(
        self, query: Query, user: UserFeatures, found: Candidates, features: FeatureMatrix, deadline: Deadline
    ) -> npt.NDArray[np.float32]:
        """Scores [N], higher is better.

        Raises: DeadlineExceeded, Unavailable, Overloaded, VersionMismatch.
        """
        item_key, event_type, time_us = _history(user)
        request = pb.RankRequest(
            request_id=query.request_id,
            feature_names=features.names,
            features_f32=np.ascontiguousarray(features.values, "<f4").tobytes(),
            item_keys=found.item_key.tolist(),
            history_keys=item_key,
            history_types=event_type,
            history_times_us=time_us,
            as_of_us=query.as_of_us,
        )
        response = await _called("Rank", self._stub.Rank(request, timeout=deadline.timeout_s()))
        scores = np.array(response.scores, np.float32)
        if len(scores) != len(found) or not np.isfinite(scores).all():
            raise Unavailable(
                "scoring worker, Rank",
                came=f"{len(scores)} scores, {np.count_nonzero(~np.isfinite(scores))} not finite",
                expected=f"{len(found)} finite scores",
                fix="Look at the worker's log; restart it with the gateway's run.",
            )
        self._version = response.version
        return scores


def remote_filter(where: Where) -> pb.RetrieveFilter:
    """What a worker is asked for."""
    return pb.RetrieveFilter(
        categories=sorted(where.categories or ()),
        brands=sorted(where.brands or ()),
        deny_categories=sorted(where.deny_categories),
        deny_brands=sorted(where.deny_brands),
        price_min_minor=where.price_min_minor,
        price_max_minor=where.price_max_minor,
        allow_keys=() if where.allow is None else where.allow.tolist(),
    )


def where_of(asked: pb.RetrieveFilter) -> Where:
    """What a worker was asked for; the worker's side of `RemoteAnnSource`."""
    return Where(
        categories=frozenset(asked.categories) or None,
        brands=frozenset(asked.brands) or None,
        deny_categories=frozenset(asked.deny_categories),
        deny_brands=frozenset(asked.deny_brands),
        price_min_minor=asked.price_min_minor if asked.HasField("price_min_minor") else None,
        price_max_minor=asked.price_max_minor if asked.HasField("price_max_minor") else None,
        allow=np.array(asked.allow_keys, np.int64) if asked.allow_keys else None,
    )


def _history(user: UserFeatures) -> tuple[list[int], list[int], list[int]]:
    newest = slice(-HISTORY_ITEMS_MAX, None)
    return (
        user.recent_item_key[newest].tolist(),
        user.recent_event_type[newest].tolist(),
        user.recent_time_us[newest].tolist(),
    )


async def _called(method: str, call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _as_ours(method, error) from error


def _as_ours(method: str, error: grpc.aio.AioRpcError) -> Double11Error:
    what, came = f"scoring worker, {method}", f"{error.code().name} {error.details() or ''}".strip()
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(what, came=came, expected="an answer in time", fix="Add workers or raise the deadline.")
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(what, came=came, expected="room in the worker's queue", fix="Add workers (--workers N).")
    if error.code() in _MISFITS:
        return VersionMismatch(what, came=came, expected="a worker of the gateway's run", fix="Restart both together.")
    return Unavailable(what, came=came, expected="an answer", fix="See `double11 status`; dead workers are restarted.")
