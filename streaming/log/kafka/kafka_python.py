"""The Kafka log with kafka-python: pure Python, for machines without a librdkafka."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Event as StopEvent
from typing import Any, TypeVar

from kafka import KafkaAdminClient, TopicPartition, errors
from kafka import KafkaConsumer as Client
from kafka import KafkaProducer as ProducerClient
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.protocol.consumer import IsolationLevel, OffsetSpec
from kafka.structs import OffsetAndMetadata

from recsys.core import Clock, Double11Error, Unavailable
from recsys.core.logging import get_logger
from streaming.config import KafkaConfig
from streaming.log.kafka.base import (
    MESSAGE_BYTES_MAX,
    REFILL_RECORDS,
    KafkaConsumer,
    KafkaLog,
    KafkaMembership,
    KafkaProducer,
    headers_of,
)
from streaming.log.kafka.buffer import Records
from streaming.topics import Topics

T = TypeVar("T")
_log = get_logger(__name__)
_REFUSED = (errors.AuthorizationError, errors.SaslAuthenticationFailedError, errors.UnsupportedSaslMechanismError)
# A subscription made while kafka-python's first metadata request is under way is lost until the next one (its
# `ClusterMetadata.set_topics` says so); with its default of 5 minutes a leader would share out nothing for so long.
METADATA_AGE_MS = 10_000
_BY_BROKER = 1  # a record's timestamp_type
_GONE = (errors.OffsetOutOfRangeError, errors.NoOffsetForPartitionError, errors.LogTruncationError)


class KafkaPythonLog(KafkaLog):
    """A Log on Kafka through kafka-python."""

    def __init__(
        self,
        servers: str,
        config: KafkaConfig,
        topics: Topics,
        clock: Clock | None = None,
        stop: StopEvent | None = None,
    ) -> None:
        super().__init__(servers, config, topics, clock, stop)
        self._reason = _Reason()
        self._client: Any = None
        self._lock = threading.Lock()

    def settings(self) -> dict[str, Any]:
        """What every client of this log needs."""
        c = self.config
        found: dict[str, Any] = {
            "bootstrap_servers": self.servers.split(","),
            "client_id": "double11",
            "security_protocol": c.security_protocol,
            "request_timeout_ms": c.request_timeout_ms,
            "bootstrap_timeout_ms": c.request_timeout_ms,
            "reconnect_backoff_max_ms": 1_000,
            "metric_reporters": [],
        }
        if c.security_protocol.startswith("SASL"):
            found |= {
                "sasl_mechanism": c.sasl_mechanism,
                "sasl_plain_username": c.sasl_username,
                "sasl_plain_password": c.password(),
            }
        files = {"ssl_cafile": c.ssl_ca_file, "ssl_certfile": c.ssl_cert_file, "ssl_keyfile": c.ssl_key_file}
        return found | {name: str(path) for name, path in files.items() if path is not None}

    def producer(self) -> KafkaPythonProducer:
        """A producer, usable from several threads."""
        return KafkaPythonProducer(self)

    def consumer(self, topic: str, offsets: Mapping[int, int]) -> KafkaPythonConsumer:
        """A consumer. Raises: NotFound."""
        return KafkaPythonConsumer(self, topic, offsets)

    def membership(self, group: str, topic: str, *, alone: bool = False) -> KafkaPythonMembership:
        """Join a consumer group. Raises: NotFound."""
        return KafkaPythonMembership(self, group, topic, alone=alone)

    def close(self) -> None:
        """Let go of the admin connections."""
        self._reason.close()
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def guarded(self, call: Callable[[], T], topic: str) -> T:
        """The call's result. Raises: our error for one of kafka-python."""
        try:
            return call()
        except errors.KafkaError as error:
            raise self.error(error, topic) from error

    def error(self, error: Exception, topic: str) -> Double11Error:
        """An error of kafka-python as one of ours."""
        reason = self._reason.last if isinstance(error, errors.KafkaTimeoutError) else None
        came = f"{type(error).__name__} {error}" if reason is None else f"{type(reason).__name__} {reason}"
        if isinstance(reason or error, _REFUSED):
            return self.refused(came)
        if reason is not None and "SSL" in str(reason):
            return self.handshake_failed(came)
        if isinstance(error, errors.InvalidReplicationFactorError):
            return self.too_few_brokers(came)
        if isinstance(error, _GONE):
            return self.offsets_gone(topic, came)
        return self.unavailable(came)

    def _ask(self, question: Callable[[Any], T], topic: str = "") -> T:
        """Ask the admin client, one thread at a time; it is made when it is first needed."""
        with self._lock:
            if self._client is None:
                self._client = self.guarded(lambda: KafkaAdminClient(**self.settings()), topic)
            self._reason.last = None
            try:
                return self.guarded(lambda: question(self._client), topic)
            except Unavailable:
                self._client.close()  # it may know no broker any more; the next one asks the URL's again
                self._client = None
                raise

    def _cluster_id(self) -> str:
        return str(self._ask(lambda admin: admin.describe_cluster())["cluster_id"])

    def _present(self) -> dict[str, int]:
        found = self._ask(lambda admin: admin.describe_topics())
        return {t["name"]: len(t["partitions"]) for t in found if not t["error_code"] and t["partitions"]}

    def _create(self, partitions: Mapping[str, int]) -> None:
        new = {
            t: {
                "num_partitions": n,
                "replication_factor": self.config.replication_factor,
                "configs": self.topic_settings(t),
            }
            for t, n in partitions.items()
        }
        timeout_ms = self.config.request_timeout_ms
        made = self._ask(lambda admin: admin.create_topics(new, timeout_ms=timeout_ms, raise_errors=False))
        for topic in made["topics"]:
            kind = errors.for_code(topic["error_code"])
            if kind not in (errors.NoError, errors.TopicAlreadyExistsError):
                raise self.error(kind(topic.get("error_message") or ""), topic["name"])

    def _offsets(self, topic: str, *, end: bool) -> dict[int, int]:
        spec = OffsetSpec.LATEST if end else OffsetSpec.EARLIEST
        asked = {TopicPartition(topic, p): spec for p in range(self.num_partitions(topic))}
        found = self._ask(lambda admin: admin.list_partition_offsets(asked, IsolationLevel.READ_COMMITTED), topic)
        return {at.partition: int(there.offset) for at, there in found.items()}


class _Reason(logging.Handler):
    """Why no broker was reached: kafka-python raises a timeout, and tells its log alone that it was not let in."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last: Exception | None = None
        self._source = logging.getLogger("kafka.net.manager")
        self._source.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a refusal rather than the mere loss of a connection that comes with it."""
        found = [a for a in record.args or () if isinstance(a, Exception)]
        if found and (isinstance(found[0], _REFUSED) or "SSL" in str(found[0])):
            self.last = found[0]

    def close(self) -> None:
        """Stop listening."""
        self._source.removeHandler(self)
        super().close()


class KafkaPythonProducer(KafkaProducer):
    """Idempotent: a batch sent again after a lost answer is stored once, in order.

    kafka-python 3 buffers without a bound, so this waits for what is under way whenever the bound is reached.
    """

    _log: KafkaPythonLog

    def __init__(self, log: KafkaPythonLog) -> None:
        super().__init__(log)
        c = log.config
        self._timeout_s = c.delivery_timeout_ms / 1e3
        self._waiting_bytes = 0  # since the last flush
        self._client = log.guarded(
            lambda: ProducerClient(
                **log.settings(),
                acks="all",
                enable_idempotence=True,
                compression_type=None if c.compression == "none" else c.compression,
                linger_ms=c.linger_ms,
                max_request_size=MESSAGE_BYTES_MAX,
                delivery_timeout_ms=c.delivery_timeout_ms,
                max_block_ms=c.request_timeout_ms,
                allow_auto_create_topics=False,
            ),
            "",
        )

    def close(self) -> None:
        """Flush and let go."""
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drop what has not been sent."""
        # Its own close() first waits for what is under way, and when that takes longer, raises and lets nothing go.
        if self._client._sender is not None:
            self._client._sender.force_close()
        with suppress(errors.KafkaTimeoutError):
            self._client.close(timeout=0)

    def _send(self, topic: str, partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        self._waiting_bytes += len(key) + len(value)
        if self._waiting_bytes > self._log.config.buffer_bytes_max:
            self._flush()
        sent = self._log.guarded(lambda: self._client.send(topic, value, key, headers, partition), topic)
        sent.add_errback(lambda error: self._failed(self._log.error(error, topic)))

    def _flush(self) -> None:
        self._log.guarded(lambda: self._client.flush(self._timeout_s + 1), "")
        self._waiting_bytes = 0


class KafkaPythonConsumer(KafkaConsumer):
    """Assigned, never subscribed: the store's offsets say where reading starts."""

    _log: KafkaPythonLog

    def __init__(self, log: KafkaPythonLog, topic: str, offsets: Mapping[int, int]) -> None:
        super().__init__(log, topic, offsets)
        half = log.config.prefetch_bytes_max // 2  # the other half may be in our buffer
        self._client = log.guarded(
            lambda: Client(
                **log.settings(),
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed",
                allow_auto_create_topics=False,
                fetch_max_bytes=half,
                max_partition_fetch_bytes=min(half, MESSAGE_BYTES_MAX),
            ),
            topic,
        )
        self._assign(offsets)

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _assign(self, offsets: Mapping[int, int]) -> None:
        self._partitions = [TopicPartition(self._topic, p) for p in offsets]
        self._client.assign(self._partitions)
        for at in self._partitions:
            self._client.seek(at, offsets[at.partition])

    def _fetched(self) -> bool:
        arrived = self._log.guarded(lambda: self._client.poll(timeout_ms=0, max_records=REFILL_RECORDS), self._topic)
        for at, found in arrived.items():
            records = Records(
                [r.offset for r in found],
                self._log.append_us(((r.timestamp_type, r.timestamp) for r in found), _BY_BROKER),
                [r.key or b"" for r in found],
                [r.value or b"" for r in found],
                [headers_of(tuple(r.headers)) for r in found],
            )
            self._buffer.fill(at.partition, records)
        for at in self._partitions:
            # Past markers and aborted records too, which are never handed over.
            position = self._log.guarded(lambda at=at: self._client.position(at, timeout_ms=0), self._topic)  # type: ignore[misc]
            if position is not None:
                self._buffer.reached(at.partition, position)
        return bool(arrived)


class _Joining:
    """A join under way, for the next poll to wait for.

    kafka-python 3.0 takes one that has ended between two polls for one to begin anew, so that members who only look in
    may join for ever; this one has not ended until it is waited for.
    """

    is_done = False

    def __init__(self, join: Any) -> None:
        self.add_callback, self.add_errback = join.add_callback, join.add_errback


class KafkaPythonMembership(KafkaMembership):
    """Joins with cooperative-sticky, so beside members of either driver."""

    _log: KafkaPythonLog

    def __init__(self, log: KafkaPythonLog, group: str, topic: str, *, alone: bool) -> None:
        super().__init__(log, topic, alone=alone)
        c = log.config
        self._client = log.guarded(
            lambda: Client(
                **log.settings(),
                group_id=group,
                group_instance_id=(c.group_instance_id or None) if self.is_group else None,
                partition_assignment_strategy=(CooperativeStickyAssignor,),
                session_timeout_ms=c.session_timeout_ms,
                heartbeat_interval_ms=c.heartbeat_ms,
                enable_auto_commit=False,
                auto_offset_reset="latest",
                allow_auto_create_topics=False,
                fetch_max_bytes=1,
                max_partition_fetch_bytes=1,
                metadata_max_age_ms=METADATA_AGE_MS,
            ),
            "",
        )
        if self.is_group:
            self._client.subscribe([topic])
        else:  # it refuses to be polled for nothing
            self._client.assign([TopicPartition(topic, p) for p in self._all])
            self._client.pause(*self._client.assignment())

    def _leave(self) -> None:
        self._client.close()

    def _poll(self) -> frozenset[int]:
        # kafka-python 3.0 throws away what a join brought if nothing asks for a join any more at the poll after it, as
        # when it began for new metadata only, which the join marks as seen. So ask until its result is taken.
        coordinator = self._client._coordinator
        if coordinator.need_rejoin() or coordinator._join_task is not None:
            coordinator.request_rejoin()
        try:
            self._client.poll(timeout_ms=0)
            if not isinstance(coordinator._join_task, _Joining | None):
                coordinator._join_task = _Joining(coordinator._join_task)
        except errors.FencedInstanceIdError as error:
            raise self._log.name_taken() from error
        except _REFUSED as error:
            raise self._log.error(error, "") from error
        except errors.KafkaError as error:  # the group's coordinator is away, or is moving; it goes on trying
            _log.warning("kafka_group_error", detail=str(error))
        assigned = self._client.assignment()
        if new := assigned - self._client.paused():
            self._client.pause(*new)
        return frozenset(at.partition for at in assigned)

    def _serve(self) -> None:
        try:
            self._client.poll(timeout_ms=0)
        except errors.KafkaError as error:
            _log.warning("kafka_group_error", detail=str(error))

    def _commit(self, offsets: Mapping[tuple[str, int], int]) -> None:
        at = {TopicPartition(t, p): OffsetAndMetadata(o, "", -1) for (t, p), o in offsets.items()}
        try:
            self._client.commit_async(at, callback=lambda _, found: self._answered(isinstance(found, Exception)))
        except errors.KafkaError:
            self._answered(failed=True)
