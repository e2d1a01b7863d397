"""What both Kafka drivers share: topics and their settings, fair polls, and the errors a reader can act on."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import lru_cache
from threading import Event as StopEvent
from types import MappingProxyType
from typing import Self

from recsys.core import (
    BadInput,
    Clock,
    Conflict,
    Double11Error,
    NotFound,
    Overloaded,
    Unavailable,
    VersionMismatch,
    WallClock,
    logging,
    metrics,
)
from streaming.config import KafkaConfig
from streaming.log.base import Consumer, Membership, Producer, RecordBatch, check_size, partition_for
from streaming.log.kafka.buffer import FairBuffer
from streaming.topics import Topics

_log = logging.get_logger(__name__)
MESSAGE_BYTES_MAX = 2 << 20  # a value of a mebibyte with key, headers and framing
REFILL_RECORDS = 1 << 16
_PAUSE_S = 0.05
_NO_CERTIFICATE = (
    " We show no certificate: where the broker asks for one (ssl.client.auth=required), the TLS handshake fails "
    "until ssl_cert_file and ssl_key_file are set."
)
_LOGIN = " A wrong login may look the same, where the line is cut before the answer: check user and sasl_password_file."
_LAST_COMMIT_S = 5.0
_LEAVE_S = 5.0
_LAST_CALL_S = 3.0


class Patience:
    """How long one call may wait for a broker: `timeout_s`, and a few seconds more once the process is to end."""

    def __init__(self, timeout_s: float, stop: StopEvent) -> None:
        self._until_s, self._stop, self._ends = time.monotonic() + timeout_s, stop, False

    def left_s(self) -> float:
        """Seconds left, 0 or less when it is over. To be asked every second or so."""
        now_s = time.monotonic()
        if not self._ends and self._stop.is_set():
            self._ends, self._until_s = True, min(self._until_s, now_s + _LAST_CALL_S)
        return self._until_s - now_s


class KafkaLog(ABC):
    """A Log on a Kafka cluster, whose clock stamps the records; topics that others made may have those of producers."""

    def __init__(
        self,
        servers: str,
        config: KafkaConfig,
        topics: Topics,
        clock: Clock | None = None,
        stop: StopEvent | None = None,
    ) -> None:
        """servers: host:port[,host:port]. topics: their names; the catalogue's is compacted. clock, stop: see
        `open_log`.
        """
        self.servers, self.config = servers, config
        self._topics, self._clock, self._stop = topics, clock or WallClock(), stop or StopEvent()
        self._partitions: dict[str, int] = {}

    def create_topics(self, partitions: Mapping[str, int]) -> None:
        """Create the topics that are missing.

        Raises: VersionMismatch for another number of partitions; BadInput for more replicas than brokers; Unavailable.
        """
        deadline_s = time.monotonic() + self.config.request_timeout_ms / 1e3
        present = self._present()
        missing = {t: n for t, n in partitions.items() if t not in present}
        if missing:
            self._create(missing)
        while not partitions.keys() <= present.keys():  # brokers learn of a new topic a little later
            if time.monotonic() > deadline_s:
                raise self.unavailable(f"no word of the new topics {sorted(missing)}")
            time.sleep(_PAUSE_S)
            present = self._present()
        for topic, number in partitions.items():
            if present[topic] != number:
                raise VersionMismatch(
                    f"topic {topic} at {self.servers}",
                    came=f"{number} partitions",
                    expected=f"{present[topic]}, as it was created with",
                    fix="P never changes in place: set [streaming] partitions and [feature_store.redis] buckets to "
                    "that, or name a second set of topics in [streaming.topics] and move over to it.",
                )

    def log_id(self) -> str:
        """The cluster's id. Raises: Unavailable."""
        return f"kafka:{self._cluster_id()}"

    def num_partitions(self, topic: str) -> int:
        """Partitions of a topic. Raises: NotFound, Unavailable."""
        if topic not in self._partitions:
            present = self._present()
            if topic not in present:
                raise NotFound(
                    f"topic {topic}",
                    came=f"none at {self.servers}",
                    expected="an existing topic",
                    fix=f"Create it: double11 streaming init --log kafka://{self.servers}",
                )
            self._partitions[topic] = present[topic]
        return self._partitions[topic]

    def begin_offsets(self, topic: str) -> Mapping[int, int]:
        """First offset still there, by partition."""
        return self._offsets(topic, end=False)

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        """Last stable offset, by partition: open transactions are not counted."""
        return self._offsets(topic, end=True)

    def append_us(self, stamps: Iterable[tuple[int, int]], by_broker: int) -> list[int]:
        """When the log took each record, microseconds UTC; stamps: (whose, milliseconds), by_broker: the broker's mark.

        Others are the producers', and count up to what our clock says: a fast one would vouch for its own events.
        """
        now_ms = self._clock.now_us() // 1_000
        return [1_000 * (ms if whose == by_broker else min(ms, now_ms)) for whose, ms in stamps]

    def patience(self, timeout_s: float) -> Patience:
        """For a call that begins now."""
        return Patience(timeout_s, self._stop)

    def check(self) -> None:
        """Raises: Unavailable unless a broker answers."""
        self._present()

    @abstractmethod
    def producer(self) -> Producer:
        """A producer, usable from several threads."""

    @abstractmethod
    def consumer(self, topic: str, offsets: Mapping[int, int]) -> Consumer:
        """A consumer of the given partitions from the given offsets on."""

    @abstractmethod
    def membership(self, group: str, topic: str, *, alone: bool = False) -> Membership:
        """Join a consumer group, or, alone, only tell it how far this process is."""

    def name_taken(self) -> Conflict:
        """Another process has joined the group under our static name."""
        return Conflict(
            f"Kafka at {self.servers}",
            came=f"another member named {self.config.group_instance_id}",
            expected="a name of its own for each process",
            fix="Give each `double11 ingest` its own [streaming.kafka] group_instance_id, e.g. its pod's name.",
        )

    @abstractmethod
    def close(self) -> None:
        """Let go of the connections of the log itself."""

    @abstractmethod
    def _cluster_id(self) -> str:
        """What the brokers call their cluster. Raises: Unavailable."""

    @abstractmethod
    def _present(self) -> dict[str, int]:
        """Every topic and its number of partitions. Raises: Unavailable."""

    @abstractmethod
    def _create(self, partitions: Mapping[str, int]) -> None:
        """Create topics; one that has come into being meanwhile is no error."""

    @abstractmethod
    def _offsets(self, topic: str, *, end: bool) -> dict[int, int]:
        """First or last stable offset, by partition."""

    def topic_settings(self, topic: str) -> dict[str, str]:
        """Settings of a topic that is created."""
        settings = {
            "max.message.bytes": str(MESSAGE_BYTES_MAX),
            "min.insync.replicas": str(self.config.min_insync_replicas),
            "message.timestamp.type": "LogAppendTime",  # a producer's clock cannot vouch for itself
        }
        c, t = self.config, self._topics
        if topic == t.catalog:
            return settings | _compacted(1_000 * c.catalog_history_s)
        longer = {t.dead_letter: c.dead_letter_retention_s, t.deltas: c.deltas_retention_s}
        return settings | {"cleanup.policy": "delete", "retention.ms": str(1_000 * longer.get(topic, c.retention_s))}

    def unavailable(self, came: object) -> Unavailable:
        """The broker is away, or does not understand us."""
        login = _LOGIN if self.config.security_protocol.startswith("SASL") else ""
        return Unavailable(
            f"Kafka at {self.servers}",
            came=came,
            expected="a broker that answers",
            fix="Check that it runs and that the address and [streaming.kafka] are right, then start again: "
            f"what was acknowledged is kept.{login}{'' if self._shows_certificate else _NO_CERTIFICATE}",
        )

    def too_few_brokers(self, came: object) -> BadInput:
        """More replicas than brokers were asked for."""
        return BadInput(
            f"topics at {self.servers}",
            came=came,
            expected=f"at least {self.config.replication_factor} brokers",
            fix="Add brokers; on a single one set [streaming.kafka] replication_factor and min_insync_replicas to 1.",
        )

    def refused(self, came: object) -> BadInput:
        """The broker knows us and says no."""
        return BadInput(
            f"Kafka at {self.servers}",
            came=came,
            expected="to be let in",
            fix="Check user, password file, sasl_mechanism, certificates and the broker's access rules.",
        )

    def handshake_failed(self, came: object) -> BadInput:
        """The broker ended the TLS handshake."""
        return BadInput(
            f"TLS handshake with Kafka at {self.servers}",
            came=came,
            expected="a broker that takes our certificate, or asks for none",
            fix="Check [streaming.kafka] ssl_cert_file and ssl_key_file: is it of an authority that the broker trusts?"
            if self._shows_certificate
            else f"Check [streaming.kafka] ssl_ca_file.{_NO_CERTIFICATE}",
        )

    @property
    def _shows_certificate(self) -> bool:
        """Whether a broker that asks for one gets a certificate, or none is asked for without TLS."""
        return not self.config.security_protocol.endswith("SSL") or self.config.ssl_cert_file is not None

    def offsets_gone(self, topic: str, came: object) -> VersionMismatch:
        """The log no longer has, or never had, the offset we want to read."""
        return VersionMismatch(
            f"topic {topic} at {self.servers}",
            came=came,
            expected="the offsets that the store has come to",
            fix="Records are gone, or this is another log: rebuild: double11 features materialize ARCHIVE --store URL.",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class KafkaProducer(ABC):
    """Checks records on their way in, and tells every thread that flushes of what failed since its last flush."""

    def __init__(self, log: KafkaLog) -> None:
        self._log = log
        self._failures = 0  # only grows; `_told` is how many of them this thread knows
        self._last_failure: Double11Error | None = None
        self._told = threading.local()

    def send(
        self,
        topic: str,
        key: bytes,
        value: bytes,
        headers: Mapping[str, bytes] | None = None,
        partition: int | None = None,
    ) -> None:
        """Hand over one record.

        Raises: BadInput for a value that is too large, or the partition; NotFound, Unavailable, Overloaded.
        """
        check_size(topic, value)
        partition = partition_for(topic, key, self._log.num_partitions(topic), partition)
        self._send(topic, partition, key, value, list(headers.items()) if headers else [])

    def flush(self) -> None:
        """Return when everything sent is durable. Raises: Unavailable, BadInput."""
        self._flush()
        told, self._told.failures = getattr(self._told, "failures", 0), self._failures
        if self._last_failure is not None and told < self._failures:
            raise self._last_failure

    @abstractmethod
    def close(self) -> None:
        """Flush and let go."""

    @abstractmethod
    def abandon(self) -> None:
        """Let go without waiting for what was sent."""

    @abstractmethod
    def _send(self, topic: str, partition: int, key: bytes, value: bytes, headers: list[tuple[str, bytes]]) -> None:
        """Buffer one record; waits for space up to the delivery timeout."""

    @abstractmethod
    def _flush(self) -> None:
        """Wait until every record is delivered or has failed. Raises: Unavailable."""

    def _failed(self, error: Double11Error) -> None:
        """A record could not be delivered."""
        self._last_failure = error
        self._failures += 1

    def _full(self) -> Overloaded:
        return Overloaded(
            f"Kafka at {self._log.servers}",
            came="more records than the brokers take",
            expected=f"space in a buffer of {self._log.config.buffer_bytes_max} bytes",
            fix="Send more slowly, or raise [streaming.kafka] buffer_bytes_max.",
        )


class KafkaMembership(ABC):
    """A member of a consumer group that fetches nothing: what it is assigned stays paused.

    alone: no member, but a consumer that has everything and commits under the group's name.
    """

    def __init__(self, log: KafkaLog, topic: str, *, alone: bool) -> None:
        self._log, self._topic, self.is_group = log, topic, not alone
        self._all = frozenset(range(log.num_partitions(topic)))
        self._unanswered = 0  # commits

    def poll(self) -> frozenset[int]:
        """Partitions that are ours now. Raises: Conflict, BadInput."""
        return self._poll() if self.is_group else self._all

    def commit(self, offsets: Mapping[str, Mapping[int, int]]) -> None:
        """Send offsets to the group, not waiting for an answer."""
        if not self.is_group:
            self._serve()
        at = {(t, p): offset for t, by_partition in offsets.items() for p, offset in by_partition.items()}
        if at:
            self._unanswered += 1
            self._commit(at)

    def close(self) -> None:
        """Leave the group, once it has heard how far we are, or has had its time."""
        until_s = time.monotonic() + _LAST_COMMIT_S
        while self._unanswered > 0 and time.monotonic() < until_s:
            self._serve()
            time.sleep(_PAUSE_S)
        # A client waits a minute and more for a broker that is silent; the group forgets who goes without a word.
        leaving = threading.Thread(target=self._leave, name="leave-group", daemon=True)
        leaving.start()
        leaving.join(_LEAVE_S)
        if leaving.is_alive():
            _log.warning("group_not_left", topic=self._topic, waited_s=_LEAVE_S)

    def _answered(self, failed: bool) -> None:
        """Group offsets are information: a failure costs nothing but their freshness."""
        self._unanswered -= 1
        metrics.GROUP_COMMITS.labels("failed" if failed else "done").inc()

    @abstractmethod
    def _leave(self) -> None:
        """Close the client."""

    @abstractmethod
    def _poll(self) -> frozenset[int]:
        """Serve the group, and pause what is new."""

    @abstractmethod
    def _serve(self) -> None:
        """Let the client take in the answers to commits, where nothing else is polled for."""

    @abstractmethod
    def _commit(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Send offsets."""


class KafkaConsumer(ABC):
    """Hands out fairly what the client has fetched; asks after a broker that has been silent too long."""

    def __init__(self, log: KafkaLog, topic: str, offsets: Mapping[int, int]) -> None:
        log.num_partitions(topic)
        self._log, self._topic = log, topic
        self._buffer = FairBuffer(topic, offsets)
        self._heard_s = time.monotonic()

    def assign(self, offsets: Mapping[int, int]) -> None:
        """Read these instead; what has arrived is thrown away. Raises: Unavailable."""
        self._assign(offsets)
        self._buffer = FairBuffer(self._topic, offsets)
        self._heard_s = time.monotonic()

    def poll(self, *, records_max: int, bytes_max: int) -> list[RecordBatch]:
        """What has arrived. Raises: Unavailable, VersionMismatch."""
        if not self._buffer:
            now_s = time.monotonic()
            if self._fetched():
                self._heard_s = now_s
            elif now_s - self._heard_s > self._log.config.request_timeout_ms / 1e3:
                self._ask_after(now_s)
        return self._buffer.take(records_max, bytes_max)

    def _ask_after(self, now_s: float) -> None:
        """Nothing has come for long: that is fine if a broker answers, or may still come back in time."""
        try:
            self._log.check()
        except Unavailable:
            if now_s - self._heard_s > 2 * self._log.config.request_timeout_ms / 1e3:
                raise
        else:
            self._heard_s = now_s

    @abstractmethod
    def close(self) -> None:
        """Let go of the connections."""

    @abstractmethod
    def _assign(self, offsets: Mapping[int, int]) -> None:
        """Tell the client."""

    @abstractmethod
    def _fetched(self) -> bool:
        """Move what the client has fetched into the buffer, without waiting; whether there was anything."""


def _compacted(history_ms: int) -> dict[str, str]:
    """Settings of a topic whose records are all readable for `history_ms`, and soon after only the newest of a key.

    A broker compacts closed segments alone, so they are closed in time.
    """
    return {
        "cleanup.policy": "compact",
        "min.compaction.lag.ms": str(history_ms),
        "max.compaction.lag.ms": str(2 * history_ms),
        "segment.ms": str(history_ms // 4),
        "min.cleanable.dirty.ratio": "0.1",
    }


@lru_cache(maxsize=1024)
def headers_of(pairs: tuple[tuple[str, bytes], ...]) -> Mapping[str, bytes]:
    """Headers as a mapping; most records carry one of a few."""
    return MappingProxyType({name: content or b"" for name, content in pairs})
