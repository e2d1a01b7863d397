"""The gateway: one process that runs the pipeline for storefronts and looks after its workers. Torch-free.

    storefront -> RecommendService -> Admission -> Cascade -> store, scoring worker, rerank worker
                                                           -> LogWriter -> impressions

It starts what the run and the flags ask for (scoring workers, rerank worker, on `embedded:` the streaming writer),
reads the catalogue and, for its indexes, the deltas, says SERVING once all is there or its time is over, and
drains on SIGTERM: NOT_SERVING, calls in flight finished, impressions flushed, children stopped. A worker that dies
costs its tier, not the answer.
"""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import grpc
import numpy as np
from double11.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    recommend_pb2,
    recommend_pb2_grpc,
)

from feature_store.online import feature_clock, open_reader
from llm_reranker.client import RemoteReranker
from recsys.candidates.nearest.sharded import Shard
from recsys.candidates.rows import FreshRows
from recsys.core import RunDirectory, Unavailable, WallClock, logging, metrics
from recsys.core.config import Config
from recsys.core.items import ItemTable
from recsys.pipeline import Budget, Cascade, PipelineConfig, Ports, build
from recsys.ranking.live import LiveCatalogue
from recsys.serving.admin_service import AdminService
from recsys.serving.admission import Admission
from recsys.serving.arms import limited, served_arm
from recsys.serving.catalog import CatalogFollower
from recsys.serving.config import (
    AdmissionConfig,
    CatalogConfig,
    PeakConfig,
    PeakPlan,
    PublishConfig,
    ServingConfig,
    TlsConfig,
)
from recsys.serving.deltas import RowFollower
from recsys.serving.event_service import EventService
from recsys.serving.impressions import Impressions
from recsys.serving.log_writer import LogWriter
from recsys.serving.peak import NO_PLAN, Peak
from recsys.serving.recommend_service import InForce, RecommendService
from recsys.serving.remote import AnnShard, RemoteAnnSource, RemoteScorer, open_channel
from recsys.serving.server import Server, on_loopback
from recsys.serving.supervisor import Backoff, ChildSpec, Supervisor
from recsys.serving.tls import credentials_for
from streaming.config import JobConfig
from streaming.log import Log, open_log, topics_at
from streaming.topics import StreamingConfig

T = TypeVar("T")
_log = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `double11 serve` was told.

    store, log: URLs. shards: of the item index. workers: scoring processes, of each shard. reranker: offer tier full.
    writer: run the streaming job beside an embedded store.
    config_path: the double11.toml that the workers read too. log_level: theirs.
    """

    run: Path
    store: str
    log: str
    listen: str = "127.0.0.1:50051"
    arm: str = "full"
    workers: int = 1
    shards: int = 1
    reranker: bool = True
    writer: bool = True
    config_path: Path | None = None
    log_level: str = "info"


class Gateway:
    """One gateway and its workers. `start`, then `wait_ready`, then `stop`, in one event loop."""

    def __init__(self, options: ServeOptions, config: Config) -> None:
        """Raises: NotFound, CorruptData for the run; BadInput, VersionMismatch for an arm it cannot serve; BadInput for
        listeners (see `tls.credentials_for`).
        """
        self.run = RunDirectory.open(options.run.resolve())  # `current` may be moved while we serve
        self.arm = served_arm(options.arm, self.run, reranker=options.reranker)
        self.port = self.admin_port = 0
        self._options, self._config = options, config
        self._serving, tls = config.get(ServingConfig), config.get(TlsConfig)
        self._credentials = credentials_for(options.listen, self._serving, tls)
        self._admin_credentials: grpc.ServerCredentials | None = None
        if not on_loopback(options.listen) and not on_loopback(self._serving.admin_listen):
            self._admin_credentials = credentials_for(self._serving.admin_listen, self._serving, tls)
        self._admission = Admission(config.get(AdmissionConfig))
        self._peak = Peak(config.get(PeakConfig).prepared(), self._admission, self._use)
        self._supervisor = Supervisor(
            Backoff(first_s=self._serving.restart_backoff_s_min, max_s=self._serving.restart_backoff_s_max),
            self._serving.start_deaths_max,
        )
        self._in_force: InForce | None = None
        self._state, self._started_s = "starting", time.monotonic()
        self._servers: list[Server] = []
        self._stack = AsyncExitStack()  # what `stop` undoes, last first

    async def start(self) -> None:
        """Start workers, open the log and the store, build the cascade, listen with health NOT_SERVING.

        Log and store are waited for, up to `start_s_max`: a reader has to learn the store's view set and buckets.
        Raises: Unavailable for a taken port; whatever the run's files, the log and the store raise.
        """
        options, serving = self._options, self._serving
        stop = threading.Event()
        log = open_log(options.log, self._config, stop=stop)
        self._stack.callback(stop.set)  # a start that is broken off leaves a call behind
        topics = topics_at(options.log, self._config)
        partitions = self._config.get(StreamingConfig).partitions_by_topic(topics)
        await self._answered(partial(log.create_topics, partitions))
        self._stack.callback(log.close)
        self._stack.push_async_callback(self._supervisor.stop, serving.drain_s_max)
        self._ann, scorer = self._scoring()
        reranker = self._reranker()
        if options.writer and options.store.startswith("embedded:"):
            self._supervisor.start(_writer(options))
        reader = await self._answered(partial(open_reader, options.store, self._config))
        clock = feature_clock(reader, self._config)
        items = await asyncio.to_thread(ItemTable.read, self.run.path("items.parquet"))
        ports = Ports(
            features=reader,
            clock=clock,
            rng=np.random.default_rng(),
            ann=self._ann,
            scorer=scorer,
            reranker=reranker,
            live=self._follow(log, topics.catalog, items),
            rows=self._follow_rows(log, topics.deltas),
        )
        # Once: the folder may hold another run when a peak plan comes.
        self._cascade = await asyncio.to_thread(
            build, self.arm, self.run, ports, config=self._config.get(PipelineConfig), budget=self._config.get(Budget)
        )
        self._use(NO_PLAN)
        if active := self._config.get(PeakConfig).active:
            self._peak.activate(active)
        writer = LogWriter(log.producer(), serving.log_queue_bytes_max)
        self._stack.callback(stop.set)  # once the writer has had its time, nothing waits long for a broker any more
        self._stack.push_async_callback(asyncio.to_thread, writer.close, serving.drain_s_max)
        impressions = Impressions(writer, topics.impressions, self.run.run_id)
        self._recommend = RecommendService(self._current, clock, self._admission, impressions, serving)
        publish = self._config.get(PublishConfig)
        await self._listen(EventService(writer, topics, partitions, serving, publish))
        if serving.metrics_port:
            server, thread = metrics.serve_http("serving.metrics_port", serving.metrics_port, serving.metrics_host)
            self._stack.callback(thread.join)
            self._stack.callback(server.shutdown)

    async def wait_ready(self) -> None:
        """Wait for workers and catalogue, each up to its bound, then say SERVING.

        Without a worker its tier is missing; without the whole catalogue, slates say catalog:behind.
        Raises: Unavailable for a worker that cannot load, with its reason; BadInput for workers elsewhere that have
        other shards than the configuration says.
        """
        late, _ = await asyncio.gather(
            self._supervisor.wait_ready(self._serving.start_s_max), self._catalog.wait_caught_up()
        )
        if late:
            _log.error("serving_without_workers", missing=",".join(late), waited_s=self._serving.start_s_max)
        if self._ann is not None:
            await self._ann.check()
        gc.collect()
        gc.freeze()  # items, indexes and stubs stay: scanning them again and again would stall requests
        for server in self._servers:
            await server.set_serving(True)
        self._state = "serving"
        _log.info("serving", run=self.run.run_id, arm=self.arm.name, tier=self.arm.tier.label, port=self.port)

    async def stop(self) -> None:
        """Drain and stop: NOT_SERVING, calls in flight finished, impressions flushed, children stopped."""
        self._state = "draining"
        await self._stack.aclose()

    def status(self) -> admin_pb2.GetStatusResponse:
        """What AdminService says."""
        cascade = self._current().cascade
        return admin_pb2.GetStatusResponse(
            state=self._state,
            versions=cascade.versions_now(),
            uptime_s=time.monotonic() - self._started_s,
            in_flight_requests=self._admission.in_flight,
            in_flight_limit=self._admission.limit,
            responses_by_tier=dict(self._recommend.responses_by_tier),
            parts=[
                admin_pb2.PartStatus(name=c.spec.name, state=c.state, detail=c.detail)
                for c in self._supervisor.children
            ]
            + _stages(cascade)
            + (self._ann.status() if self._ann is not None else [])
            + [self._catalog.status(), self._rows.status()],
            peak_plan=self._peak.active.name,
        )

    async def _answered(self, ask: Callable[[], T]) -> T:
        """What `ask` gives, once log or store is there: a crash loop would find it minutes later.

        Raises: Unavailable when `start_s_max` is over; whatever else `ask` raises, at once.
        """
        retry, wait_s, told = self._config.get(JobConfig), 0.0, False
        while True:
            try:
                return await asyncio.to_thread(ask)
            except Unavailable as error:
                left_s = self._started_s + self._serving.start_s_max - time.monotonic()
                if left_s <= 0:
                    raise
                if not told:
                    _log.warning("start_refused", cause=str(error), tries_for_s=round(left_s))
                    told = True
            wait_s = min(max(2 * wait_s, retry.retry_ms / 1e3), retry.retry_ms_max / 1e3, left_s)
            await asyncio.sleep(wait_s)

    def _current(self) -> InForce:
        assert self._in_force is not None, "the server listens after `_use`"
        return replace(self._in_force, behind=self._catalog.behind())

    def _follow(self, log: Log, topic: str, items: ItemTable) -> LiveCatalogue:
        config = self._config
        live = LiveCatalogue(items, config.get(CatalogConfig).new_items_max)
        self._catalog = CatalogFollower(log, topic, live, WallClock(), config.get(CatalogConfig), config.get(JobConfig))
        self._catalog.start()
        self._stack.push_async_callback(asyncio.to_thread, self._catalog.close)
        return live

    def _follow_rows(self, log: Log, topic: str) -> FreshRows:
        rows = FreshRows()
        self._rows = RowFollower(log, topic, self.run.run_id, rows, WallClock())
        following = asyncio.create_task(self._rows.run())
        self._stack.callback(following.cancel)
        return rows

    def _use(self, plan: PeakPlan) -> None:
        """Put the arm under a plan in force; users keep their cached slates."""
        arm = limited(self.arm, plan)
        self._in_force = InForce(
            cascade=self._cascade.under(arm), lowered_by=plan.name if arm.tier > self.arm.tier else ""
        )

    def _scoring(self) -> tuple[RemoteAnnSource | None, RemoteScorer | None]:
        if self.arm.order == "source" and "ann" not in {f.source for f in self.arm.feeds}:
            return None, None
        channels = [open_channel(target) for target in self._scoring_targets()]
        for channel in channels:
            self._stack.push_async_callback(channel.close)
        count, files = len(channels), self.run.manifest["files"]
        tower, ranker = (
            files.get(f"models/{m}.safetensors", {"sha256": ""})["sha256"][:12] for m in ("tower", "ranker")
        )
        tower = tower if count > 1 else ""  # one worker's answer stands for itself, whatever its run
        shards = [AnnShard(channel, Shard(number, count), tower) for number, channel in enumerate(channels)]
        return RemoteAnnSource(shards), RemoteScorer(channels, ranker)

    def _scoring_targets(self) -> list[str]:
        """Of the workers of each shard: elsewhere, or started here."""
        serving = self._serving
        if serving.scoring_target or serving.scoring_shards:
            return list(serving.scoring_shards) or [serving.scoring_target]
        shards, workers = self._options.shards, range(self._options.workers)
        return [
            "ipv4:" + ",".join(self._start_scoring(Shard(number, shards), worker) for worker in workers)
            for number in range(shards)
        ]

    def _start_scoring(self, shard: Shard, worker: int) -> str:
        name = f"scoring-{worker}" if shard.whole else f"scoring-{shard.number}of{shard.count}-{worker}"
        index = shard.number * self._options.workers + worker
        more = ("--log", self._options.log, "--name", name, "--shard", str(shard), "--index", str(index))
        return self._start_worker(name, "recsys.serving.worker", *more)

    def _reranker(self) -> RemoteReranker | None:
        if self.arm.order != "rerank":
            return None
        version = self.run.reranker_versions()[-1]
        facts = json.loads(self.run.path(f"reranker/{version}/double11.json").read_text("utf-8"))
        target = self._serving.rerank_target or "ipv4:" + ",".join(
            self._start_worker(
                f"rerank-{i}" if i else "rerank", "llm_reranker.server", "--version", version, "--index", str(i)
            )
            for i in range(self._serving.rerank_workers)
        )
        reranker = RemoteReranker(target, version=version, feature_names=tuple(facts["feature_names"]))
        self._stack.push_async_callback(reranker.close)
        return reranker

    def _start_worker(self, name: str, module: str, *more: str) -> str:
        address = self._supervisor.reserve_port()
        argv = ["-m", module, "--run", str(self.run.root), "--listen", address, *more]
        argv += ["--log-level", self._options.log_level]
        if self._options.config_path is not None:
            argv += ["--config", str(self._options.config_path)]
        self._supervisor.start(ChildSpec(name=name, argv=argv))
        return address

    async def _listen(self, events: EventService) -> None:
        """The main listener, and one for AdminService where the main one is not on loopback."""
        main, admin = Server(self._serving.drain_s_max), None
        self._stack.push_async_callback(self._drain)
        recommend_pb2_grpc.add_RecommendationServiceServicer_to_server(self._recommend, main.grpc)
        event_pb2_grpc.add_EventServiceServicer_to_server(events, main.grpc)
        names = [_full_name(recommend_pb2, "RecommendationService"), _full_name(event_pb2, "EventService")]
        admin_name = _full_name(admin_pb2, "AdminService")
        admin_service = AdminService(self.status, self._peak)
        if on_loopback(self._options.listen):
            admin_pb2_grpc.add_AdminServiceServicer_to_server(admin_service, main.grpc)
            names.append(admin_name)
        else:
            admin = Server(self._serving.drain_s_max)
            admin_pb2_grpc.add_AdminServiceServicer_to_server(admin_service, admin.grpc)
        self.port = self.admin_port = await self._start_server(main, self._options.listen, names, self._credentials)
        if admin is not None:
            to_admin, credentials = self._serving.admin_listen, self._admin_credentials
            self.admin_port = await self._start_server(admin, to_admin, [admin_name], credentials)
        if self._serving.health_listen:
            await self._start_server(Server(self._serving.drain_s_max), self._serving.health_listen, names, None)

    async def _start_server(
        self, server: Server, listen: str, names: list[str], credentials: grpc.ServerCredentials | None
    ) -> int:
        port = await server.start(listen, names, credentials)
        self._servers.append(server)
        return port

    async def _drain(self) -> None:
        """All listeners at once: what one of them waits for must not keep another open."""
        await asyncio.gather(*(server.drain() for server in self._servers))


def _stages(cascade: Cascade) -> list[admin_pb2.PartStatus]:
    """What it asks, as it answered last, wherever it runs: a process that hangs is there, too."""
    asked = {"store": ["user", "hydrate"]}
    asked |= {"ranker": ["rank"]} if cascade.scorer is not None else {}
    asked |= {"reranker": ["rerank"]} if cascade.reranker is not None else {}
    told = [(name, *cascade.health.of(*stages)) for name, stages in asked.items()]
    return [admin_pb2.PartStatus(name=n, state="ok" if ok else "down", detail=detail) for n, ok, detail in told]


def _writer(options: ServeOptions) -> ChildSpec:
    command = "from recsys.cli.main import main; main()"
    argv = ["-c", command, "--log-level", options.log_level]
    argv += ["ingest", "--source", options.log, "--store", options.store, "--json"]  # so it says why it ends
    if options.config_path is not None:
        argv += ["--config", str(options.config_path)]
    return ChildSpec(name="writer", argv=argv, says_ready=False)


def _full_name(module: ModuleType, service: str) -> str:
    name: str = module.DESCRIPTOR.services_by_name[service].full_name
    return name
