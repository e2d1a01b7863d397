"""The Kafka log with confluent-kafka (librdkafka): the default driver.

Source of the settings' meaning: librdkafka's CONFIGURATION.md.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import Future, wait
from threading import Event as StopEvent
from typing import Any

from confluent_kafka import (
    TIMESTAMP_LOG_APPEND_TIME,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka import Consumer as Client
from confluent_kafka import Producer as ProducerClient
from confluent_kafka.admin import AdminClient, ClusterMetadata, NewTopic, OffsetSpec

from recsys.core import Clock, Double11Error, logging
from streaming.config import KafkaConfig
from streaming.log.kafka.base import (
    MESSAGE_BYTES_MAX,
    REFILL_RECORDS,
    KafkaConsumer,
    KafkaLog,
    KafkaMembership,
    KafkaProducer,
    Patience,
    headers_of,
)
from streaming.log.kafka.buffer import Records
from streaming.topics import Topics

_log = logging.get_logger(__name__)
_WAIT_S = 0.1
_ASK_S = 1.0
_REFUSED = {
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
}
_ALERT = "SSL alert"  # the broker's last word in a TLS handshake; librdkafka takes it for a lost line
_UNREACHED = {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT}
_PASSING = {*_UNREACHED, KafkaError._RESOLVE}
# A partition has just got a leader, or another one; librdkafka's admin client leaves asking again to us.
_MOVING = {
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
}


class ConfluentLog(KafkaLog):
    """A Log on Kafka through librdkafka."""

    def __init__(
        self,
        servers: str,
        config: KafkaConfig,
        topics: Topics,
        clock: Clock | None = None,
        stop: StopEvent | None = None,
    ) -> None:
        super().__init__(servers, config, topics, clock, stop)
        self._timeout_s = config.request_timeout_ms / 1e3
        self._refusal: KafkaError | None = None  # the last one; calls only say that no broker was reached
        self._admin = AdminClient(self.settings())

    def settings(self) -> dict[str, Any]:
        """What every client of this log needs."""
        c = self.config
        found: dict[str, Any] = {
            "bootstrap.servers": self.servers,
            "client.id": "double11",
            "security.protocol": c.security_protocol,
            "socket.timeout.ms": c.request_timeout_ms,
            "reconnect.backoff.max.ms": 1_000,
            "error_cb": self._on_error,
            "log_level": 2,  # what matters reaches error_cb
        }
        if c.security_protocol.startswith("SASL"):
            found |= {
                "sasl.mechanism": c.sasl_mechanism,
                "sasl.username": c.sasl_username,
                "sasl.password": c.password(),
            }
        files = {"ca": c.ssl_ca_file, "certificate": c.ssl_cert_file, "key": c.ssl_key_file}
        return found | {f"ssl.{name}.location": str(path) for name, path in files.items() if path is not None}

    def producer(self) -> ConfluentProducer:
        """A producer, usable from several threads."""
        return ConfluentProducer(self)

    def consumer(self, topic: str, offsets: Mapping[int, int]) -> ConfluentConsumer:
        """A consumer. Raises: NotFound."""
        return ConfluentConsumer(self, topic, offsets)

    def membership(self, group: str, topic: str, *, alone: bool = False) -> ConfluentMembership:
        """Join a consumer group. Raises: NotFound."""
        return ConfluentMembership(self, group, topic, alone=alone)

    def close(self) -> None:
        """The admin client has nothing to finish; its connections go with it. Calls under way end soon."""
        self._stop.set()

    def error(self, error: KafkaError | KafkaException, topic: str) -> Double11Error:
        """An error of librdkafka as one of ours."""
        if isinstance(error, KafkaException):
            error = _inner(error)
        if error.code() in _UNREACHED:
            error = self._refusal or error
        if error.code() in _REFUSED:
            return self.refused(error.str())
        if _ALERT in error.str():
            return self.handshake_failed(error.str())
        if error.code() == KafkaError.INVALID_REPLICATION_FACTOR:
            return self.too_few_brokers(error.str())
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            return self.offsets_gone(topic, error.str())
        return self.unavailable(error.str())

    def _cluster_id(self) -> str:
        return str(self._metadata().cluster_id)

    def _on_error(self, error: KafkaError) -> None:
        """Librdkafka goes on trying by itself; the reader of the log should know what it is about."""
        if error.code() in _REFUSED or _ALERT in error.str():
            self._refusal = error
        _log.warning("kafka_client_error", code=error.name(), detail=error.str())

    def _present(self) -> dict[str, int]:
        topics = self._metadata().topics
        return {name: len(t.partitions) for name, t in topics.items() if t.error is None and t.partitions}

    def _metadata(self) -> ClusterMetadata:
        patience = self.patience(self._timeout_s)
        while True:
            left_s = patience.left_s()
            try:
                found = self._admin.list_topics(timeout=min(max(left_s, _WAIT_S), _ASK_S))
                break
            except KafkaException as error:
                self._admin.poll(0)  # hands over what `_on_error` gets
                if self._refusal is not None or left_s <= _ASK_S:  # who is not let in need not ask on
                    raise self.error(error, "") from error
        self._refusal = None
        return found

    def _wait(self, answers: Collection[Future[Any]], patience: Patience) -> None:
        """Until all are there: by itself librdkafka asks for leaders first, and then waits as long again."""
        while wait(answers, min(max(patience.left_s(), 0), _ASK_S)).not_done:
            if patience.left_s() <= 0:
                raise self.unavailable("no answer in time") if self._refusal is None else self.error(self._refusal, "")

    def _create(self, partitions: Mapping[str, int]) -> None:
        replicas = self.config.replication_factor
        new = [NewTopic(t, n, replicas, config=self.topic_settings(t)) for t, n in partitions.items()]
        patience = self.patience(self._timeout_s + 1)
        for topic, made in self._admin.create_topics(new, request_timeout=self._timeout_s).items():
            self._wait([made], patience)
            try:
                made.result()
            except KafkaException as error:
                if _inner(error).code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise self.error(error, topic) from error

    def _offsets(self, topic: str, *, end: bool) -> dict[int, int]:
        spec = OffsetSpec.latest() if end else OffsetSpec.earliest()
        asked: dict[Any, Any] = {TopicPartition(topic, p): spec for p in range(self.num_partitions(topic))}
        patience = self.patience(self._timeout_s + 1)
        while True:
            found: dict[Any, Any] = self._admin.list_offsets(
                asked, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=self._timeout_s
            )
            self._wait(found.values(), patience)
            try:
                return {at.partition: made.result().offset for at, made in found.items()}
            except KafkaException as error:
                if _inner(error).code() not in _MOVING or patience.left_s() <= 0:
                    raise self.error(error, topic) from error
            time.sleep(_WAIT_S)
            self._present()  # asks for the leaders again


class ConfluentProducer(KafkaProducer):
    """Idempotent: a batch sent again after a lost answer is stored once, in order."""

    _log: ConfluentLog

    def __init__(self, log: ConfluentLog) -> None:
        super().__init__(log)
        c = log.config
        self._timeout_s = c.delivery_timeout_ms / 1e3
        self._client = ProducerClient(
            log.settings()
            | {
                "acks": "all",
                "enable.idempotence": True,
                "compression.type": c.compression,
                "linger.ms": c.linger_ms,
                "message.max.bytes": MESSAGE_BYTES_MAX,
                "message.timeout.ms": c.delivery_timeout_ms,
                "request.timeout.ms": c.request_timeout_ms,
                "queue.buffering.max.kbytes": c.buffer_bytes_max >> 10,
                "queue.buffering.max.messages": 0,
                "delivery.report.only.error": True,
                "on_delivery": self._on_delivery,
            }
        )

    def close(self) -> None:
        """Flush."""
        self.flush()

    def abandon(self) -> None:
        """Drop what has not been sent."""
        self._client.purge(in_queue=True, in_flight=True, blocking=False)

    def _send(self, topic: str, partition: int, key: bytes, value: bytes, headers: Any) -> None:
        patience: Patience | None = None
        while True:
            try:
                self._client.produce(topic, value, key, partition, headers=headers)
                return
            except BufferError as error:
                patience = patience or self._log.patience(self._timeout_s)
                if patience.left_s() <= 0:
                    raise self._full() from error
                self._client.poll(_WAIT_S)
            except KafkaException as error:
                raise self._log.error(error, topic) from error

    def _flush(self) -> None:
        patience = self._log.patience(self._timeout_s + 1)  # by then each has been delivered or given up
        while left := self._client.flush(min(max(patience.left_s(), 0), _ASK_S)):
            if patience.left_s() <= 0:
                raise self._log.unavailable(f"{left} records not acknowledged")

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failed(self._log.error(error, message.topic() or ""))


class ConfluentConsumer(KafkaConsumer):
    """Assigned, never subscribed: the store's offsets say where reading starts."""

    _log: ConfluentLog

    def __init__(self, log: ConfluentLog, topic: str, offsets: Mapping[int, int]) -> None:
        super().__init__(log, topic, offsets)
        half = log.config.prefetch_bytes_max // 2  # the other half may be in our buffer
        self._client = Client(
            log.settings()
            | {
                "group.id": "double11-assigned",  # librdkafka wants one; nothing is committed under it
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,  # says how far there is nothing left: transactions leave gaps
                "check.crcs": True,
                "queued.max.messages.kbytes": half >> 10,
                "fetch.max.bytes": half,
                "fetch.message.max.bytes": min(half, MESSAGE_BYTES_MAX),
            }
        )
        self._assign(offsets)

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _assign(self, offsets: Mapping[int, int]) -> None:
        self._client.assign([TopicPartition(self._topic, p, o) for p, o in offsets.items()])

    def _fetched(self) -> bool:
        messages: list[Any] = self._client.consume(REFILL_RECORDS, timeout=0)
        arrived: dict[int, list[Any]] = defaultdict(list)
        for m in messages:
            if (error := m.error()) is None:
                arrived[m.partition()].append(m)
            elif error.code() == KafkaError._PARTITION_EOF:
                self._buffer.reached(m.partition(), m.offset())
            elif not error.retriable() and error.code() not in _PASSING:
                raise self._log.error(error, self._topic)
        for partition, found in arrived.items():
            records = Records(
                [m.offset() for m in found],
                self._log.append_us((m.timestamp() for m in found), TIMESTAMP_LOG_APPEND_TIME),
                [m.key() or b"" for m in found],
                [m.value() or b"" for m in found],
                [headers_of(tuple(m.headers() or ())) for m in found],
            )
            self._buffer.fill(partition, records)
        return bool(messages)


class ConfluentMembership(KafkaMembership):
    """Joins with cooperative-sticky: a rebalance moves only the partitions that change hands."""

    _log: ConfluentLog

    def __init__(self, log: ConfluentLog, group: str, topic: str, *, alone: bool) -> None:
        super().__init__(log, topic, alone=alone)
        c = log.config
        named = {"group.instance.id": c.group_instance_id} if c.group_instance_id and not alone else {}
        self._client = Client(
            log.settings()
            | named
            | {
                "group.id": group,
                "partition.assignment.strategy": "cooperative-sticky",
                "session.timeout.ms": c.session_timeout_ms,
                "heartbeat.interval.ms": c.heartbeat_ms,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "latest",
                "queued.max.messages.kbytes": 1,
                "fetch.message.max.bytes": 1,
                "on_commit": lambda error, _: self._answered(error is not None),
            }
        )
        if self.is_group:
            self._client.subscribe([topic])
        self._paused: frozenset[int] = frozenset()

    def _leave(self) -> None:
        self._client.close()

    def _poll(self) -> frozenset[int]:
        while (message := self._client.poll(0)) is not None:
            error = message.error()
            if error is None:
                continue  # came before its partition was paused
            if error.code() == KafkaError.FENCED_INSTANCE_ID:
                raise self._log.name_taken()
            if error.code() in _REFUSED or error.fatal():
                raise self._log.error(error, "")
        assigned = frozenset(at.partition for at in self._client.assignment())
        if new := assigned - self._paused:
            self._client.pause([TopicPartition(self._topic, p) for p in new])
        self._paused = assigned
        return assigned

    def _serve(self) -> None:
        self._client.poll(0)

    def _commit(self, offsets: Mapping[tuple[str, int], int]) -> None:
        try:
            self._client.commit(offsets=[TopicPartition(t, p, o) for (t, p), o in offsets.items()], asynchronous=True)
        except KafkaException:
            self._answered(failed=True)


def _inner(error: KafkaException) -> KafkaError:
    found = error.args[0]
    assert isinstance(found, KafkaError), "librdkafka raises with a KafkaError"
    return found
