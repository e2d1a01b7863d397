"""A real Kubernetes control plane, where DOUBLE11_CONTROL_PLANE names one; else nothing here is collected."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recsys.bench.servers import free_ports

CONTROL_PLANE = os.environ.get("DOUBLE11_CONTROL_PLANE", "")
collect_ignore_glob = [] if CONTROL_PLANE else ["test_*.py"]


@pytest.fixture(scope="session")
def kubectl(
    tmp_path_factory: pytest.TempPathFactory, used_server: Callable[[str, str], None]
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run kubectl against a cluster of its own."""
    folder, script = tmp_path_factory.mktemp("cluster"), str(Path(CONTROL_PLANE) / "cluster.sh")
    try:
        # Its servers inherit our stdout unless it is a file, and would keep a pipe open.
        with (folder / "start.log").open("w+") as log:
            started = subprocess.run(
                [script, "start", str(folder), str(free_ports(3)[0])], stdout=log, stderr=log, timeout=120
            )
            log.seek(0)
            assert started.returncode == 0, log.read()

        def run(*args: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
            command = ["kubectl", "--kubeconfig", str(folder / "kubeconfig"), *args]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, input=stdin)
            assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            return done

        version = run("version", "-o", "yaml").stdout.rsplit("gitVersion:", 1)[1].split()[0]
        used_server("kubernetes control plane", f"{version} from {CONTROL_PLANE}")
        yield run
    finally:
        subprocess.run([script, "stop", str(folder)], timeout=120, check=True)
