"""RerankService in a process of its own. Heavy: torch.

    python -m llm_reranker.server --run RUN --listen 127.0.0.1:0

Loads the run's reranker, checks its known answer, and prints one JSON line {"ready": true, "port", "version",
"metrics_port"} on stdout when it serves. SIGTERM drains: health says NOT_SERVING, calls in flight end. Compute has a
thread of its own; the event loop only parses and waits.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import click
import grpc
import torch
from double11.v1 import rerank_pb2 as pb
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from llm_reranker import messages
from llm_reranker.base import Reranker
from llm_reranker.config import RerankConfig
from llm_reranker.local import LocalReranker, read_version
from llm_reranker.prompt import clip
from recsys.core import logging, metrics
from recsys.core.config import Config
from recsys.core.deadline import Deadline
from recsys.core.errors import BadInput, Double11Error, Overloaded, VersionMismatch
from recsys.core.items import ItemTable
from recsys.core.memory import keep_freed_memory
from recsys.core.rpc import SERVER
from recsys.core.run_dir import RunDirectory

SERVICE = pb.DESCRIPTOR.services_by_name["RerankService"].full_name
_NO_RETRY = (("grpc-retry-pushback-ms", "-1"),)  # gRFC A6
_MESSAGE_BYTES_MAX = 16 << 20
_DETAILS_BYTES_MAX = 1024
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Stoppable(Reranker, Protocol):
    """A reranker that a server owns."""

    async def stop(self) -> None:
        """End what it started."""
        ...


class RerankServer:
    """gRPC front of one reranker: ours, or a scoring server's."""

    def __init__(self, reranker: Stoppable, config: RerankConfig) -> None:
        self._reranker, self._config = reranker, config
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=(*SERVER, ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX), ("grpc.so_reuseport", 1))
        )
        # Requests come as bytes, so that what does not parse is the caller's INVALID_ARGUMENT and not our INTERNAL.
        rerank: grpc.RpcMethodHandler[bytes, pb.RerankResponse] = grpc.unary_unary_rpc_method_handler(
            self._rerank, request_deserializer=None, response_serializer=pb.RerankResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Rerank": rerank}),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, listen: str) -> int:
        """Serve; the bound port. Raises: BadInput for an address that cannot be bound."""
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise BadInput(
                "--listen", came=f"{listen}: {error}", expected="HOST:PORT", fix="Choose another."
            ) from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return int(port)

    async def drain(self) -> None:
        """Stop taking calls, finish those in flight."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(self._config.drain_s_max)
        await self._reranker.stop()

    async def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _rerank(self, data: bytes, context: Context) -> pb.RerankResponse:
        remaining_s, c = context.time_remaining(), self._config
        ms = c.deadline_ms_default if remaining_s is None else min(remaining_s * 1e3, c.deadline_ms_max)
        deadline = Deadline.after_ms(ms)
        try:
            message = _parsed(data)
            if message.version not in ("", self._reranker.version):
                raise VersionMismatch(
                    "RerankRequest.version", came=message.version, expected=self._reranker.version,
                    fix="Restart gateway and rerank worker with the same run.",
                )  # fmt: skip
            request = messages.from_proto(message, len(self._reranker.feature_names))
            result = await self._reranker.rerank(request, deadline)
        except Double11Error as error:
            trailing = _NO_RETRY if isinstance(error, Overloaded) else ()
            # What came may be as long as a message; a status travels in headers, which are not.
            await context.abort(grpc.StatusCode[error.grpc_status], clip(str(error), _DETAILS_BYTES_MAX), trailing)
        return messages.result_to_proto(message.request_id, result)


def _parsed(data: bytes) -> pb.RerankRequest:
    try:
        return pb.RerankRequest.FromString(data)
    except DecodeError as error:
        raise BadInput(
            "RerankRequest", came=f"{len(data)} bytes: {error}", expected="double11.v1.RerankRequest, UTF-8 strings",
            fix="Generate the client from protos/double11/v1.",
        ) from error  # fmt: skip


async def serve(run_path: Path, version: str | None, listen: str, config: RerankConfig, index: int = 0) -> None:
    """Load, serve, say so on stdout, drain on SIGTERM or SIGINT. index: which of several workers of one host."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    run = RunDirectory.open(run_path, verify=False)
    reranker = await _reranker(run, version, config)
    server = RerankServer(reranker, config)
    gc.collect()
    gc.freeze()  # what is loaded stays: collecting it again and again costs 100 ms stalls
    port = await server.start(listen)
    metrics_port = config.metrics_port and config.metrics_port + index
    if metrics_port:
        metrics.serve_http("llm_reranker.metrics_port", metrics_port, config.metrics_host)
    ready = {"ready": True, "port": port, "version": reranker.version, "metrics_port": metrics_port}
    print(json.dumps(ready), flush=True)
    await stop.wait()
    await server.drain()


async def _reranker(run: RunDirectory, version: str | None, config: RerankConfig) -> Stoppable:
    """The run's reranker here, or the scoring server that the configuration names. Raises: as both do."""
    if config.backend == "ours":
        return LocalReranker.load(run, version, config=config)
    from llm_reranker.http_backend import HttpReranker

    version, loaded = read_version(run, version, config)
    return await HttpReranker.connect(loaded, ItemTable.read(run.path("items.parquet")), config, version=version)


@click.command()
@click.option("--run", "run_path", type=click.Path(path_type=Path), required=True, help="Run directory.")
@click.option("--version", help="Version under reranker/ (default: the newest).")
@click.option("--listen", default="127.0.0.1:0", show_default=True, help="HOST:PORT; port 0 = any free one.")
@click.option("--index", type=click.IntRange(0, 63), default=0, help="Of several workers: added to metrics_port.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="double11.toml.")
@click.option("--log-level", type=click.Choice(logging.LEVELS), default="info", show_default=True)
def main(
    run_path: Path, version: str | None, listen: str, index: int, config_path: Path | None, log_level: str
) -> None:
    """Serve one run's reranker."""
    logging.configure(log_level)
    try:
        asyncio.run(serve(run_path, version, listen, Config.load(config_path).get(RerankConfig), index))
    except Double11Error as error:
        print(json.dumps(error.as_json()), flush=True)  # for whoever supervises
        print(f"rerank worker: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
