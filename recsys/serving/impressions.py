"""An Impression record for every slate: offered to the log writer's bounded queue, never awaited by a request."""

from __future__ import annotations

import uuid

from double11.v1 import event_pb2 as pb

from recsys.core import Double11Error, Query, Slate, metrics
from recsys.serving.log_writer import LogWriter, Record
from streaming.log import SCHEMA_HEADER, SCHEMA_VERSION, STRESS_HEADER


class Impressions:
    """Writes what was shown, keyed by user. Outcomes: durable, failed, dropped (queue full), gone (nobody waited).

    Shown = handed to gRPC while the caller waited: whether a slate then reached the caller, only the caller knows.
    """

    def __init__(self, writer: LogWriter, topic: str, run_id: str) -> None:
        self._writer, self._topic, self._run_id = writer, topic, run_id

    def record(self, query: Query, slate: Slate) -> None:
        """Queue one slate's record; a full queue drops it and counts that."""
        value = impression(query, slate, self._run_id).SerializeToString()
        headers = {SCHEMA_HEADER: SCHEMA_VERSION} | ({STRESS_HEADER: b"1"} if query.stress else {})
        record = Record(topic=self._topic, key=query.user_id.encode("utf-8"), value=value, headers=headers)
        if not self._writer.offer([record], _count):
            metrics.IMPRESSIONS.labels("dropped").inc()

    def not_shown(self) -> None:
        """Count a slate whose caller was gone before it was sent; it leaves no record."""
        metrics.IMPRESSIONS.labels("gone").inc()


def impression(query: Query, slate: Slate, run_id: str) -> pb.Impression:
    """The slate as it was shown, at the request's own time (`clock = data` included); an id of its own each time.

    A storefront may send one request_id for all calls of a page: by that their slates would be repeats of the first.
    """
    return pb.Impression(
        slate_id=uuid.uuid4().hex,
        request_id=slate.request_id,
        user_id=query.user_id,
        session_id=query.session_id,
        surface=query.surface,
        event_time_us=query.as_of_us,
        tier=int(slate.tier),
        run_id=run_id,
        stress=query.stress,
        items=[
            pb.ImpressionItem(item_id=item.item_id, position=place, propensity=item.propensity, score=item.score)
            for place, item in enumerate(slate.items, start=1)
        ],
    )


def _count(error: Double11Error | None) -> None:
    metrics.IMPRESSIONS.labels("durable" if error is None else "failed").inc()
