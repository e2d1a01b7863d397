"""EventService: events from storefronts that do not speak Kafka. Validated, and acknowledged only once durable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from double11.v1 import event_pb2 as pb
from double11.v1 import event_pb2_grpc as pb_grpc

from recsys.core import BadInput, metrics
from recsys.core.ids import ID_BYTES_MAX
from recsys.serving.config import ServingConfig
from recsys.serving.log_writer import LogWriter, Record
from recsys.serving.wire import deadline_of
from streaming.codec import validate
from streaming.log import SCHEMA_HEADER, SCHEMA_VERSION, STRESS_HEADER
from streaming.topics import Topics

EVENTS_MAX, CALL_BYTES_MAX = 1_000, 1 << 20  # of event.proto, a call or a chunk of a stream
_REJECTED_MAX = 1_000
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class EventService(pb_grpc.EventServiceServicer):
    """Checks events and appends them to the log."""

    def __init__(self, writer: LogWriter, topics: Topics, config: ServingConfig) -> None:
        self._writer, self._topics, self._config = writer, topics, config

    async def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:  # noqa: N802
        """A batch: the valid events become durable, the others are named with their reason."""
        accepted, rejected = await self._take(request, 0, context)
        return pb.PublishResponse(accepted=accepted, rejected=rejected)

    async def PublishStream(  # noqa: N802
        self, requests: AsyncIterator[pb.PublishStreamRequest], context: Context
    ) -> pb.PublishStreamResponse:
        """Chunks, each made durable before the next is read: a slow disk slows the sender down."""
        response, seen = pb.PublishStreamResponse(), 0
        async for request in requests:
            accepted, rejected = await self._take(request, seen, context)
            seen += len(request.events)
            response.accepted += accepted
            response.rejected_total += len(rejected)
            response.rejected.extend(rejected[: _REJECTED_MAX - len(response.rejected)])
        return response

    async def _take(
        self, request: pb.PublishRequest | pb.PublishStreamRequest, first_index: int, context: Context
    ) -> tuple[int, list[pb.RejectedEvent]]:
        _check_size(len(request.events), "events", EVENTS_MAX)
        _check_size(request.ByteSize(), "bytes", CALL_BYTES_MAX)
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

    def _record(self, event: pb.Event) -> Record:
        kind = event.WhichOneof("body")
        assert kind is not None, "validated"
        body, shopper = getattr(event, kind), kind in ("action", "forget")
        key = body.user_id if shopper else body.item_id
        headers = {SCHEMA_HEADER: SCHEMA_VERSION} | ({STRESS_HEADER: b"1"} if event.stress else {})
        return Record(
            topic=self._topics.events if shopper else self._topics.catalog,
            key=key.encode("utf-8"),
            value=event.SerializeToString(),
            headers=headers,
        )


def _check_size(came: int, unit: str, most: int) -> None:
    if came > most:
        raise BadInput("Publish", came=f"{came} {unit}", expected=f"at most {most} a call", fix="Send several calls.")
