"""EventService: events from storefronts that do not speak Kafka. Validated, and acknowledged only once durable."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeAlias

import grpc
from double11.v1 import event_pb2 as pb
from double11.v1 import event_pb2_grpc as pb_grpc

from recsys.core import BadInput, Deadline, Double11Error, Overloaded, metrics
from recsys.core.ids import ID_BYTES_MAX
from recsys.core.murmur2 import partition_of
from recsys.serving.config import PublishConfig, ServingConfig
from recsys.serving.log_writer import LogWriter, Record
from recsys.serving.rate_limit import PublishLimiter
from recsys.serving.wire import deadline_of
from streaming.codec import owner_of, record_key, validate
from streaming.log import SCHEMA_HEADER, SCHEMA_VERSION, STRESS_HEADER
from streaming.topics import Topics

ACCEPTED = "double11-accepted"  # trailing metadata of a failed call: events that are durable all the same
EVENTS_MAX, CALL_BYTES_MAX = 1_000, 1 << 20  # of event.proto, a call or a chunk of a stream
_REJECTED_MAX = 1_000
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class EventService(pb_grpc.EventServiceServicer):
    """Checks events and appends them to the log."""

    def __init__(
        self,
        writer: LogWriter,
        topics: Topics,
        partitions: Mapping[str, int],
        config: ServingConfig,
        publish: PublishConfig,
    ) -> None:
        """partitions: of every topic."""
        self._writer, self._topics, self._config, self._publish = writer, topics, config, publish
        self._catalog_partitions = partitions[topics.catalog]
        self._limiter = PublishLimiter(publish)

    async def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:  # noqa: N802
        """A batch: the valid events become durable, the others are named with their reason.

        Over the rate limit the whole batch is refused, with the time after which it would pass.
        """
        accepted, rejected = await self._take(request, 0, context, self._tenant(context), wait_s_max=0.0)
        return pb.PublishResponse(accepted=accepted, rejected=rejected)

    async def PublishStream(  # noqa: N802
        self, requests: AsyncIterator[pb.PublishStreamRequest], context: Context
    ) -> pb.PublishStreamResponse:
        """Chunks, each made durable before the next is read: a slow disk, or the rate limit, slows the sender down.

        A call that fails says in the trailing metadata double11-accepted how many events are durable.
        """
        response, seen, tenant = pb.PublishStreamResponse(), 0, self._tenant(context)
        try:
            async for request in requests:
                accepted, rejected = await self._take(request, seen, context, tenant, self._publish.wait_s_max)
                seen += len(request.events)
                response.accepted += accepted
                response.rejected_total += len(rejected)
                response.rejected.extend(rejected[: _REJECTED_MAX - len(response.rejected)])
        except Double11Error:
            context.set_trailing_metadata(((ACCEPTED, str(response.accepted)),))
            raise
        return response

    async def _take(
        self,
        request: pb.PublishRequest | pb.PublishStreamRequest,
        first_index: int,
        context: Context,
        tenant: str,
        wait_s_max: float,
    ) -> tuple[int, list[pb.RejectedEvent]]:
        _check_size(len(request.events), "events", EVENTS_MAX)
        _check_size(request.ByteSize(), "bytes", CALL_BYTES_MAX)
        await self._admit(tenant, len(request.events), deadline_of(context, math.inf, math.inf), wait_s_max)
        deadline = deadline_of(context, self._config.deadline_ms_default, self._config.deadline_ms_max)
        records, rejected = [], []
        for index, event in enumerate(request.events, start=first_index):
            reason = validate(event)
            if reason is None:
                records.append(self._record(event))
            else:
                event_id = event.event_id if len(event.event_id.encode("utf-8")) <= ID_BYTES_MAX else ""
                rejected.append(pb.RejectedEvent(index=index, event_id=event_id, reason=f"{reason}. Mend and resend."))
        if records:
            await self._writer.append(records, deadline)
        metrics.PUBLISHED.labels("accepted").inc(len(records))
        metrics.PUBLISHED.labels("rejected").inc(len(rejected))
        return len(records), rejected

    async def _admit(self, tenant: str, num_events: int, deadline: Deadline, wait_s_max: float) -> None:
        """Return when the rate limit lets the events pass. Raises: Overloaded when that takes too long."""
        waited_s = 0.0
        while wait_s := self._limiter.take(tenant, num_events):
            left_s = min(wait_s_max - waited_s, deadline.remaining_ms() / 1e3)
            if wait_s > left_s:
                metrics.PUBLISHED.labels("limited").inc(num_events)
                raise Overloaded(
                    "Publish",
                    came=f"{num_events} events of {tenant}, over the rate limit",
                    expected="at most the rate of [serving.publish]",
                    fix=f"Nothing of these was kept: send them again after {wait_s:.1f} s, or in smaller batches.",
                    retry_after_ms=math.ceil(wait_s * 1e3),
                )
            await asyncio.sleep(wait_s)
            waited_s += wait_s

    def _tenant(self, context: Context) -> str:
        """What the call's metadata says, else the caller's address without its port."""
        if key := self._publish.tenant_key:
            named = dict(context.invocation_metadata() or ()).get(key)
            if named:
                return str(named)
        return str(context.peer()).rpartition(":")[0]

    def _record(self, event: pb.Event) -> Record:
        key, shopper = record_key(event), event.WhichOneof("body") in ("action", "forget")
        headers = {SCHEMA_HEADER: SCHEMA_VERSION} | ({STRESS_HEADER: b"1"} if event.stress else {})
        return Record(
            topic=self._topics.events if shopper else self._topics.catalog,
            key=key,
            value=event.SerializeToString(),
            headers=headers,
            partition=None if shopper else partition_of(owner_of(key), self._catalog_partitions),
        )


def _check_size(came: int, unit: str, most: int) -> None:
    if came > most:
        raise BadInput("Publish", came=f"{came} {unit}", expected=f"at most {most} a call", fix="Send several calls.")
