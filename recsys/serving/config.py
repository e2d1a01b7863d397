"""Configuration of serving: `[serving]` and its parts: tls, catalog, publish, admission, peak, worker, client."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys.core import BadInput, Tier
from recsys.core.config import in_range, section


@section("serving")
@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """The gateway.

    deadline_ms_default: for clients that set none. deadline_ms_max: cap on what a client may ask.
    admin_listen: where AdminService listens when the main listener is not on loopback.
    plain_text_beyond_loopback: let a gateway without [serving.tls] listen where other hosts reach it.
    health_listen: HOST:PORT of one more listener, in plain text, that answers health checks only; "" = none.
    scoring_target, rerank_target: gRPC addresses of workers that run elsewhere; empty = supervised on this host.
    scoring_shards: instead of scoring_target where the index is sharded: the address of the workers of shard 0, of
    shard 1, ... (`--shard`).
    rerank_workers: supervised rerank processes; requests take turns, and each keeps caches of its own.
    metrics_port: Prometheus text over HTTP on metrics_host, 0 = off.
    start_s_max: how long workers may take to load before the gateway serves without them; and how long store and log
    may be away when it starts, before it gives up.
    start_deaths_max: deaths of a worker that has not served yet after which the start fails; one that says why it
    cannot load ends it at once.
    drain_s_max: how long in-flight requests may take to finish after SIGTERM.
    restart_backoff_s_min, restart_backoff_s_max: pause before a dead worker is started again, doubled each time.
    log_queue_bytes_max: published events and impressions waiting for the durable log.
    """

    deadline_ms_default: float = 200.0
    deadline_ms_max: float = 2_000.0
    admin_listen: str = "127.0.0.1:50052"
    plain_text_beyond_loopback: bool = False
    health_listen: str = ""
    scoring_target: str = ""
    scoring_shards: tuple[str, ...] = ()
    rerank_target: str = ""
    rerank_workers: int = 1
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    start_s_max: float = 120.0
    start_deaths_max: int = 3
    drain_s_max: float = 10.0
    restart_backoff_s_min: float = 0.5
    restart_backoff_s_max: float = 30.0
    log_queue_bytes_max: int = 64 << 20

    def __post_init__(self) -> None:
        in_range("serving.deadline_ms_max", self.deadline_ms_max, 1, 60_000)
        in_range("serving.deadline_ms_default", self.deadline_ms_default, 1, self.deadline_ms_max)
        if self.scoring_target and self.scoring_shards:
            raise BadInput(
                "configuration [serving]",
                came="scoring_target and scoring_shards",
                expected="scoring_target for workers that have all items each, scoring_shards for shards",
                fix="Leave one of them out.",
            )
        in_range("serving.rerank_workers", self.rerank_workers, 1, 64)
        in_range("serving.metrics_port", self.metrics_port, 0, 65_535)
        in_range("serving.start_s_max", self.start_s_max, 0.1, 3_600)
        in_range("serving.start_deaths_max", self.start_deaths_max, 1, 1_000)
        in_range("serving.drain_s_max", self.drain_s_max, 0.1, 600)
        in_range("serving.restart_backoff_s_min", self.restart_backoff_s_min, 0.01, 60)
        in_range("serving.restart_backoff_s_max", self.restart_backoff_s_max, self.restart_backoff_s_min, 600)
        in_range("serving.log_queue_bytes_max", self.log_queue_bytes_max, 1 << 21, 1 << 34)


@section("serving.tls")
@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """TLS of the gateway's listeners; PEM files, read again at the first call on a new connection after they change.

    cert_file: the certificate, then those between it and its authority. key_file: its key, without a passphrase.
    client_ca_file: callers must show a certificate of one of these authorities (mTLS).
    """

    cert_file: Path | None = None
    key_file: Path | None = None
    client_ca_file: Path | None = None

    def __post_init__(self) -> None:
        _together("serving.tls", self.cert_file, self.key_file)
        if self.client_ca_file is not None and self.cert_file is None:
            raise BadInput(
                "configuration [serving.tls]",
                came="client_ca_file without a certificate of the gateway's own",
                expected="cert_file and key_file beside it",
                fix="Set them: only over TLS can callers show certificates.",
            )


def _together(owner: str, cert_file: Path | None, key_file: Path | None) -> None:
    if (cert_file is None) != (key_file is None):
        raise BadInput(
            f"configuration [{owner}]",
            came=f"only {'cert_file' if key_file is None else 'key_file'}",
            expected="cert_file and key_file, or neither",
            fix="Set both.",
        )


@section("serving.catalog")
@dataclass(frozen=True, kw_only=True)
class CatalogConfig:
    """The gateway's own reader of the catalogue topic.

    catch_up_s_max: how long the start waits for what is on the topic already. lag_s_max: from then on slates say
    catalog:behind. watch_s: pause between looks at the log's end. poll_ms: pause between reads; longer ones cost less
    and delay more. poll_records_max, poll_bytes_max: bounds of one read.
    backoff_s_min, backoff_s_max: pause before the log is tried again, doubled each time. new_items_max: items beside
    those of the run that may be shown once listed; beyond it, until delisted ones make room, further ones stay out.
    """

    new_items_max: int = 100_000
    catch_up_s_max: float = 30.0
    lag_s_max: float = 5.0
    watch_s: float = 1.0
    poll_ms: float = 50.0
    poll_records_max: int = 8_192
    poll_bytes_max: int = 8 << 20
    backoff_s_min: float = 0.2
    backoff_s_max: float = 10.0

    def __post_init__(self) -> None:
        in_range("serving.catalog.new_items_max", self.new_items_max, 0, 100_000_000)
        in_range("serving.catalog.catch_up_s_max", self.catch_up_s_max, 0, 3_600)
        in_range("serving.catalog.watch_s", self.watch_s, 0.01, 60)
        in_range("serving.catalog.lag_s_max", self.lag_s_max, 2 * self.watch_s, 3_600)
        in_range("serving.catalog.poll_ms", self.poll_ms, 1, 1_000)
        in_range("serving.catalog.poll_records_max", self.poll_records_max, 1, 1 << 20)
        in_range("serving.catalog.poll_bytes_max", self.poll_bytes_max, 1 << 10, 1 << 30)
        in_range("serving.catalog.backoff_s_min", self.backoff_s_min, 0.01, 60)
        in_range("serving.catalog.backoff_s_max", self.backoff_s_max, self.backoff_s_min, 600)


_METADATA_KEY = re.compile(r"(?!grpc-)[a-z0-9_.-]+")  # those that begin with grpc- are gRPC's own


@section("serving.publish")
@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """How many events EventService takes; 0 = no limit.

    events_per_s_max: of this process. tenant_events_per_s_max: of one tenant, which the call's metadata names under
    tenant_key; without that key, or where a call has none, the caller's address is the tenant. Keys of metadata are
    always lower case on the wire, so tenant_key is, however it is written. burst_s: seconds of the rate that may come
    at once. tenants_max: tenants remembered. wait_s_max: how long a stream is held back, within its deadline, before it
    is refused.
    """

    events_per_s_max: float = 10_000.0
    tenant_events_per_s_max: float = 0.0
    tenant_key: str = ""
    burst_s: float = 2.0
    tenants_max: int = 10_000
    wait_s_max: float = 10.0

    def __post_init__(self) -> None:
        in_range("serving.publish.events_per_s_max", self.events_per_s_max, 0, 1e7)
        in_range("serving.publish.tenant_events_per_s_max", self.tenant_events_per_s_max, 0, 1e7)
        in_range("serving.publish.burst_s", self.burst_s, 0.01, 600)
        in_range("serving.publish.tenants_max", self.tenants_max, 1, 1_000_000)
        in_range("serving.publish.wait_s_max", self.wait_s_max, 0, 600)
        object.__setattr__(self, "tenant_key", self.tenant_key.lower())
        if self.tenant_key and (not _METADATA_KEY.fullmatch(self.tenant_key) or self.tenant_key.endswith("-bin")):
            raise BadInput(
                "configuration serving.publish.tenant_key",
                came=self.tenant_key,
                expected="a key of gRPC metadata: a-z, 0-9, _, - and ., with text in it (not ...-bin)",
                fix="Name the key that callers send.",
            )


@section("serving.admission")
@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """How many requests are served at once, and how many may wait how long.

    Three limits together bound the time a request spends before its work starts; what does not fit is refused at once.
    """

    in_flight_limit: int = 8
    queue_items_max: int = 16
    queue_wait_ms_max: float = 50.0

    def __post_init__(self) -> None:
        in_range("serving.admission.in_flight_limit", self.in_flight_limit, 1, 100_000)
        in_range("serving.admission.queue_items_max", self.queue_items_max, 0, 100_000)
        in_range("serving.admission.queue_wait_ms_max", self.queue_wait_ms_max, 0, 10_000)


@dataclass(frozen=True, kw_only=True)
class PeakPlan:
    """A prepared set of limits and tiers. None = unchanged."""

    name: str
    tier_best: Tier | None = None
    in_flight_limit: int | None = None
    rerank_items_max: int | None = None


_PLAN_KEYS = ("tier_best", "in_flight_limit", "rerank_items_max")
_PLAN_NAME = re.compile(r"[a-z0-9-]{1,64}")


@section("serving.peak")
@dataclass(frozen=True, kw_only=True)
class PeakConfig:
    """Peak plans by name, one table each: `[serving.peak.plans.midnight]` with tier_best = "rank", ...

    active: the plan that is in force from the start on, "" = none; what is activated by hand ends with the process.
    """

    plans: Mapping[str, Any] = field(default_factory=lambda: {"midnight": {"tier_best": "rank"}})
    active: str = ""

    def __post_init__(self) -> None:
        prepared = self.prepared()
        if self.active and self.active not in prepared:
            raise BadInput(
                "configuration serving.peak.active",
                came=self.active,
                expected=f"one of {', '.join(sorted(prepared)) or 'none prepared'}",
                fix=f"Prepare it as [serving.peak.plans.{self.active}], or leave it out.",
            )

    def prepared(self) -> dict[str, PeakPlan]:
        """The plans, checked.

        Raises: BadInput for a name, key or value that cannot be.
        """
        return {name: _plan(name, table) for name, table in self.plans.items()}


def _plan(name: str, table: Any) -> PeakPlan:
    what, fix = f"configuration serving.peak.plans.{name}", "Correct double11.toml."
    if not _PLAN_NAME.fullmatch(name):
        raise BadInput(what, came=name, expected="1 to 64 of a-z, 0-9 and -", fix=fix)
    if not isinstance(table, Mapping) or (unknown := sorted(set(table) - set(_PLAN_KEYS))):
        came = unknown if isinstance(table, Mapping) else table
        raise BadInput(what, came=came, expected=f"a table with {', '.join(_PLAN_KEYS)}", fix=fix)
    label = table.get("tier_best")
    tiers = {t.label: t for t in Tier if t is not Tier.CACHED}  # cached is a fallback, nothing one can ask for
    if label is not None and label not in tiers:
        raise BadInput(f"{what}.tier_best", came=label, expected=f"one of {', '.join(tiers)}", fix=fix)
    for number, most in (("in_flight_limit", 100_000), ("rerank_items_max", 1_000)):
        value = table.get(number)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise BadInput(f"{what}.{number}", came=value, expected=f"a whole number, 1 to {most}", fix=fix)
    return PeakPlan(
        name=name,
        tier_best=tiers[label] if label is not None else None,
        in_flight_limit=table.get("in_flight_limit"),
        rerank_items_max=table.get("rerank_items_max"),
    )


@section("serving.worker")
@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """One scoring worker. threads: of torch and FAISS. queue_items_max: calls waiting for the compute thread.

    metrics_port: Prometheus text over HTTP on serving.metrics_host, 0 = off; of several workers on one host the first
    one's, then those after it.
    snapshot_path: folder for snapshots of the index; empty = beside an embedded log, none with Kafka.
    snapshot_every_s: pause between two; none is written when nothing has changed.
    """

    threads: int = 1
    snapshot_path: str = ""
    snapshot_every_s: float = 300.0
    metrics_port: int = 0
    queue_items_max: int = 64
    deadline_ms_default: float = 1_000.0
    deadline_ms_max: float = 60_000.0
    drain_s_max: float = 10.0

    def __post_init__(self) -> None:
        in_range("serving.worker.snapshot_every_s", self.snapshot_every_s, 0.05, 86_400)
        in_range("serving.worker.threads", self.threads, 1, 1_024)
        in_range("serving.worker.metrics_port", self.metrics_port, 0, 65_535)
        in_range("serving.worker.queue_items_max", self.queue_items_max, 1, 100_000)
        in_range("serving.worker.deadline_ms_max", self.deadline_ms_max, 1, 600_000)
        in_range("serving.worker.deadline_ms_default", self.deadline_ms_default, 1, self.deadline_ms_max)
        in_range("serving.worker.drain_s_max", self.drain_s_max, 0.1, 600)


@section("serving.client")
@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """The client library, and the commands that call a gateway.

    throttle_ratio: K of the client-side throttle, 0 = off. throttle_window_s: its memory. ca_file: who has signed the
    gateway's certificate; with it, calls use TLS. cert_file, key_file: what to show a gateway that asks for a
    certificate. PEM.
    """

    throttle_ratio: float = 2.0
    throttle_window_s: int = 120
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        in_range("serving.client.throttle_ratio", self.throttle_ratio, 0, 100)
        in_range("serving.client.throttle_window_s", self.throttle_window_s, 1, 3_600)
        _together("serving.client", self.cert_file, self.key_file)
        if self.cert_file is not None and self.ca_file is None:
            raise BadInput(
                "configuration [serving.client]",
                came="cert_file without ca_file",
                expected="ca_file, the authorities of the gateway's certificate: with it calls use TLS",
                fix="Set it.",
            )
