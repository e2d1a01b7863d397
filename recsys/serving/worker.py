"""Scoring worker: a process that serves ScoringService for gateways.

    python -m recsys.serving.worker --run RUN --listen 127.0.0.1:0 --log URL

With a log it follows the catalogue topic: new items become retrievable, delisted and sold-out ones leave; and the
deltas topic: what online training learns is served within seconds. With --shard I/N its index has the items of that
shard alone, in about an Nth of the memory; other workers have the others.
Prints one JSON line {"ready": true, "port": N} on stdout once it serves. SIGTERM drains: health goes NOT_SERVING,
calls in flight are finished. Compute runs on one thread, never on the event loop.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from double11.v1 import scoring_pb2 as pb
from double11.v1 import scoring_pb2_grpc as pb_grpc

from recsys.candidates.nearest.sharded import WHOLE, Shard
from recsys.core import Double11Error, RunDirectory, WallClock, logging, metrics
from recsys.core.config import Config
from recsys.core.urls import embedded_path, scheme
from recsys.models.config import IndexConfig, LiveIndexConfig
from recsys.serving.catalog import CatalogFollower
from recsys.serving.config import CatalogConfig, ServingConfig, WorkerConfig
from recsys.serving.deltas import DeltaFollower, Following
from recsys.serving.server import Server, stop_signal
from streaming.config import JobConfig
from streaming.log import open_log, topics_at

if TYPE_CHECKING:
    from recsys.serving.scoring_service import ScoringService


async def serve(
    run_path: Path, listen: str, log_url: str, name: str, shard: Shard, config: Config, index: int = 0
) -> None:
    """Load, serve, say so on stdout, drain on SIGTERM or SIGINT. index: which of several workers of one host."""
    stop, worker = stop_signal(), config.get(WorkerConfig)
    run = RunDirectory.open(run_path, verify=False)  # the gateway has checked the hashes
    with ExitStack() as stack:
        if log_url:
            service = await _following(stack, run, log_url, name, shard, config)
        else:
            service = _service(run, config, shard=shard)
        if worker.metrics_port:
            host = config.get(ServingConfig).metrics_host
            metrics.serve_http("serving.worker.metrics_port", worker.metrics_port + index, host)
        await _until_stopped(service, stop, listen, worker)


def _service(run: RunDirectory, config: Config, **more: Any) -> ScoringService:
    from recsys.serving.scoring_service import ScoringService

    worker, index, live = config.get(WorkerConfig), config.get(IndexConfig), config.get(LiveIndexConfig)
    return ScoringService(run, worker, index, live, new_items_max=config.get(CatalogConfig).new_items_max, **more)


async def _following(
    stack: ExitStack, run: RunDirectory, log_url: str, name: str, shard: Shard, config: Config
) -> ScoringService:
    """A service that reads the catalogue topic into the index and the deltas topic into the models.

    Comes back when all of the catalogue that was there is in the index, or its time is over; deltas catch up while the
    worker serves what it has.
    """
    from recsys.serving.index_snapshots import Snapshots, newest, source_of

    log, worker = stack.enter_context(open_log(log_url, config)), config.get(WorkerConfig)
    topics, root = topics_at(log_url, config), _snapshots_at(log_url, name, worker)
    of = source_of(run.run_id, log.log_id(), shard)
    models = config.get(IndexConfig), config.get(LiveIndexConfig)
    service = _service(run, config, shard=shard, restore=lambda dim: newest(root, of, dim, *models) if root else None)
    deltas = asyncio.create_task(DeltaFollower(log, topics.deltas, service, WallClock(), _tell).run())
    stack.callback(deltas.cancel)
    follower = CatalogFollower(
        log, topics.catalog, service.items, WallClock(), config.get(CatalogConfig), config.get(JobConfig)
    )
    follower.start(service.positions)
    stack.callback(follower.close)
    await follower.wait_caught_up()
    if root is not None:
        snapshots = Snapshots(root, of, service, follower, worker.snapshot_every_s)
        snapshots.start()
        stack.callback(snapshots.close)
    return service


def _snapshots_at(log_url: str, name: str, worker: WorkerConfig) -> Path | None:
    """The folder of this worker alone; None = it keeps none."""
    if worker.snapshot_path:
        return Path(worker.snapshot_path) / name
    embedded = scheme(log_url) == "embedded"
    return embedded_path(log_url, "the worker's log") / "index" / name if embedded else None


def _tell(at: Following) -> None:
    """For the supervisor: what `double11 status` says of this worker."""
    print(json.dumps({"detail": at.line(), "degraded": at.degraded}), flush=True)


async def _until_stopped(service: ScoringService, stop: asyncio.Event, listen: str, worker: WorkerConfig) -> None:
    server = Server(worker.drain_s_max, share_port=True)
    pb_grpc.add_ScoringServiceServicer_to_server(service, server.grpc)
    port = await server.start(listen, (pb.DESCRIPTOR.services_by_name["ScoringService"].full_name,))
    await server.set_serving(True)
    print(json.dumps({"ready": True, "port": port}), flush=True)
    await stop.wait()
    await server.drain()
    service.close()


@click.command()
@click.option("--run", "run_path", type=click.Path(path_type=Path), required=True, help="Run directory.")
@click.option("--listen", default="127.0.0.1:0", show_default=True, help="HOST:PORT; port 0 = any free one.")
@click.option("--log", "log_url", default="", help="Log URL; follow its catalogue topic.")
@click.option("--name", default="scoring", show_default=True, help="Of this worker among those that share a folder.")
@click.option("--shard", default=str(WHOLE), show_default=True, help="NUMBER/COUNT: the items this worker's index has.")
@click.option("--index", type=click.IntRange(0, 4095), default=0, help="Of several workers: added to metrics_port.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="double11.toml.")
@click.option("--log-level", type=click.Choice(logging.LEVELS), default="info", show_default=True)
def main(
    run_path: Path,
    listen: str,
    log_url: str,
    name: str,
    shard: str,
    index: int,
    config_path: Path | None,
    log_level: str,
) -> None:
    """Serve the towers, the index and the ranker of one run to gateways."""
    logging.configure(log_level)
    try:
        asyncio.run(serve(run_path, listen, log_url, name, Shard.parse(shard), Config.load(config_path), index))
    except Double11Error as error:
        print(json.dumps(error.as_json()), flush=True)  # for whoever supervises
        print(f"scoring worker: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
