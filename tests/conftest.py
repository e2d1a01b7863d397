"""Shared by the whole suite: which real servers and data it ran against, said in the last lines.

A fixture that starts or reaches a real server calls `used_server("kafka", "Apache Kafka 4.3.1, DOUBLE11_KAFKA_HOME")`.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A slow example is a busy machine, not a failure.
settings.register_profile("double11", deadline=None)
settings.load_profile("double11")

_USED = pytest.StashKey[dict[str, str]]()
_VARIABLES = {
    "kafka": "DOUBLE11_KAFKA or DOUBLE11_KAFKA_HOME",
    "redis": "DOUBLE11_REDIS",
    "kubernetes control plane": "DOUBLE11_CONTROL_PLANE",
}


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_USED] = {}
    spec = importlib.util.spec_from_file_location("kafka_broker", Path(__file__).with_name("kafka_broker.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config.pluginmanager.register(module, spec.name)


@pytest.fixture(scope="session")
def used_server(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Records that the suite ran against a server; takes its name and what it was."""
    used = request.config.stash[_USED]

    def record(name: str, what: str) -> None:
        assert name in _VARIABLES, f"name one of {sorted(_VARIABLES)}"
        used[name] = what

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    used = config.stash[_USED]
    servers = "; ".join(f"{n}: {used.get(n, f'none (set {variable})')}" for n, variable in _VARIABLES.items())
    terminalreporter.ensure_newline()
    terminalreporter.write_line(
        f"data: {os.environ.get('DOUBLE11_DATA', 'what the wheels ship (DOUBLE11_DATA is not set)')}"
    )
    terminalreporter.write_line(f"real servers: {servers}")
