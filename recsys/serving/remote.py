"""The gateway's side of a scoring worker: CandidateSource and Scorer over gRPC. Torch-free.

The remaining time of the request travels as the gRPC timeout; the worker drops what is over. Several workers are one
target, "ipv4:127.0.0.1:7001,127.0.0.1:7002" or "dns:///scoring:50051", and gRPC's round_robin goes round those that
are connected and answer pings. No retries: the pipeline falls through to the next tier instead. Where the index is
sharded each shard has a target: a search asks all of them at once and does without those that are missing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from double11.v1 import admin_pb2
from double11.v1 import scoring_pb2 as pb
from double11.v1 import scoring_pb2_grpc as pb_grpc

from feature_store import UserFeatures
from recsys.candidates.behaviour import touched
from recsys.candidates.nearest.sharded import WHOLE, Shard, merge
from recsys.core import (
    BadInput,
    Candidates,
    Deadline,
    DeadlineExceeded,
    Double11Error,
    Overloaded,
    Query,
    Unavailable,
    VersionMismatch,
    logging,
    metrics,
)
from recsys.core.attributes import Where
from recsys.core.rpc import TO_WORKERS
from recsys.ranking import FeatureMatrix

HISTORY_ITEMS_MAX = 512  # of scoring.proto
_PROBE_S, _LOG_EVERY_S = 5.0, 10.0
_log = logging.get_logger(__name__)
_MISFITS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
T = TypeVar("T")


def open_channel(target: str) -> grpc.aio.Channel:
    """A channel to scoring workers. Plain text: workers listen on loopback or inside the cluster's network."""
    return grpc.aio.insecure_channel(target, options=TO_WORKERS)


class AnnShard:
    """One shard of the index, behind a channel to the workers that have it."""

    def __init__(self, channel: grpc.aio.Channel, shard: Shard = WHOLE, version: str = "") -> None:
        """version: of the tower that its answers must come from; "" = any."""
        self._stub, self._shard, self._version = pb_grpc.ScoringServiceStub(channel), shard, version
        self._missing, self._since_s = "not asked yet", time.monotonic()  # why its last answer was not used
        self._log_not_before_s = 0.0

    async def ask(
        self, request: pb.RetrieveRequest, timeout_s: float | None, *, wait_for_ready: bool = False
    ) -> pb.RetrieveResponse | Double11Error:
        """Its nearest items, or why there are none of use: that is counted."""
        try:
            call = self._stub.Retrieve(request, timeout=timeout_s, wait_for_ready=wait_for_ready)
            response: pb.RetrieveResponse = await _called("Retrieve", call)
            self._check(response)
        except Double11Error as error:
            reason = "timeout" if isinstance(error, DeadlineExceeded) else error.code.lower().replace("_", "-")
            metrics.INDEX_SHARDS_MISSING.labels(str(self._shard), reason).inc()
            self._note_missing(error)
            return error
        self._missing = ""
        return response

    def status(self) -> admin_pb2.PartStatus:
        """For AdminService: as its last answer was."""
        name, now_s = f"index-shard-{self._shard}", time.monotonic()
        if not self._missing:
            return admin_pb2.PartStatus(name=name, state="ok")
        return admin_pb2.PartStatus(
            name=name, state="down", detail=f"for {now_s - self._since_s:.0f} s: {self._missing}"
        )

    def _check(self, response: pb.RetrieveResponse) -> None:
        came = f"{response.shard}/{response.num_shards}"
        if came != str(self._shard):
            raise BadInput(
                "scoring worker, Retrieve",
                came=f"shard {came} of the items",
                expected=f"shard {self._shard}",
                fix="Correct [serving] scoring_shards, one target for each shard in order, or the workers' --shard.",
            )
        version = response.version.partition("+")[0]
        if self._version and version != self._version:
            raise VersionMismatch(
                f"scoring worker, Retrieve, shard {came}",
                came=f"tower {version}",
                expected=f"tower {self._version}, that of the gateway's run: scores of two towers do not compare",
                fix="Restart the shards' workers and the gateways with one run.",
            )

    def _note_missing(self, error: Double11Error) -> None:
        now_s = time.monotonic()
        self._missing, self._since_s = str(error), self._since_s if self._missing else now_s
        if now_s >= self._log_not_before_s:  # an overloaded shard may answer every other time
            self._log_not_before_s = now_s + _LOG_EVERY_S
            _log.warning("index_shard_missing", shard=str(self._shard), error=self._missing)


class RemoteAnnSource:
    """`ann`: the user tower and FAISS, in workers; all items, or a shard of them, in each."""

    name = "ann"
    searches_where = True

    def __init__(self, shards: Sequence[AnnShard]) -> None:
        """shards: all of them, in any order."""
        self._shards = tuple(shards)

    async def retrieve(self, query: Query, user: UserFeatures, limit: int, deadline: Deadline) -> Candidates:
        """The nearest items to the user's vector among the shards that answer; none for a user without history.

        Raises: DeadlineExceeded, Unavailable, Overloaded, BadInput, VersionMismatch when no shard answers.
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
        found, score = merge(await self._answers(request, deadline.timeout_s()), limit)
        return Candidates.from_source(self.name, found[0], score[0])

    async def check(self) -> None:
        """Ask every shard once, for a few seconds at most; what does not answer is logged.

        Raises: BadInput for a shard that has other items than it should.
        """
        probe = pb.RetrieveRequest(history_keys=[0], history_types=[1], history_times_us=[0], as_of_us=1, limit=1)
        for answer in await asyncio.gather(*(s.ask(probe, _PROBE_S, wait_for_ready=True) for s in self._shards)):
            if isinstance(answer, BadInput):
                raise answer

    def status(self) -> list[admin_pb2.PartStatus]:
        """Of every shard."""
        return [s.status() for s in self._shards]

    async def _answers(
        self, request: pb.RetrieveRequest, timeout_s: float | None
    ) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Keys [1, K] and scores [1, K] of each shard that answers. Raises: the first one's error when none does."""
        answers = await asyncio.gather(*(s.ask(request, timeout_s) for s in self._shards))
        used = [a for a in answers if not isinstance(a, Double11Error)]
        if not used:
            raise next(a for a in answers if isinstance(a, Double11Error))
        return [(np.array([a.item_keys], np.int64), np.array([a.scores], np.float32)) for a in used]


class RemoteScorer:
    """The ranker, in a worker; whichever shard of the index it has beside it."""

    def __init__(self, channels: Sequence[grpc.aio.Channel], version: str) -> None:
        """channels: of the shards. version: of the run's ranker, until a worker has said which one it runs."""
        self._workers = tuple((channel, pb_grpc.ScoringServiceStub(channel)) for channel in channels)
        self._version, self._turn = version, 0

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
        response = await _called("Rank", self._next().Rank(request, timeout=deadline.timeout_s()))
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

    def _next(self) -> pb_grpc.ScoringServiceAsyncStub:
        """In turn among those that are connected; any where none is."""
        self._turn = (self._turn + 1) % len(self._workers)
        in_turn = self._workers[self._turn :] + self._workers[: self._turn]
        ready = grpc.ChannelConnectivity.READY
        return next((s for channel, s in in_turn if channel.get_state(try_to_connect=True) is ready), in_turn[0][1])


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
