"""The manifests are valid, restricted, and start commands that this release has."""

import importlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from recsys.cli.main import cli
from recsys.core.config import Config

ROOT = Path(__file__).resolve().parents[3]
KUSTOMIZATIONS = ("base", "overlays/laptop", "overlays/sharded")
PARTS = ("base/scoring", "overlays/sharded/shard-0", "overlays/sharded/shard-1", "components/scaled")  # of overlays
Manifest = dict[str, Any]


def render(folder: str) -> list[Manifest]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s" / folder)], capture_output=True, text=True, timeout=60, check=True
    )
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=KUSTOMIZATIONS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(request.param)


def workloads(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """(workload, its one container)."""
    for m in manifests:
        if m["kind"] in ("Deployment", "StatefulSet"):
            (container,) = m["spec"]["template"]["spec"]["containers"]
            yield m, container


def role_of(workload: Manifest) -> str:
    return str(workload["metadata"]["labels"]["app.kubernetes.io/name"])


def configuration_of(manifests: list[Manifest]) -> str:
    (text,) = (m["data"]["double11.toml"] for m in manifests if "double11.toml" in m.get("data", {}))
    return str(text)


@pytest.fixture
def configuration(manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    path = tmp_path / "double11.toml"
    path.write_text(configuration_of(manifests))
    for name, value in environment_of(manifests).items():
        monkeypatch.setenv(name, value)
    return Config.load(path)


def environment_of(manifests: list[Manifest]) -> dict[str, str]:
    (data,) = (m["data"] for m in manifests if m["kind"] == "ConfigMap" and "STORE_URL" in m["data"])
    return dict(data)


def test_every_kustomization_of_the_repository_is_tested() -> None:
    found = {str(p.parent.relative_to(ROOT / "k8s")) for p in (ROOT / "k8s").rglob("kustomization.yaml")}
    assert found == {*KUSTOMIZATIONS, *PARTS}


def test_strict_schemas(manifests: list[Manifest]) -> None:
    for m in manifests:
        kubernetes_validate.validate(m, "1.37", strict=True)


def test_roles_and_their_company(manifests: list[Manifest]) -> None:
    named = {
        kind: {m["metadata"]["name"] for m in manifests if m["kind"] == kind} for kind in {m["kind"] for m in manifests}
    }
    roles, work = (
        {"gateway", "scoring", "reranker", "consumer"},
        {w["metadata"]["name"] for w, _ in workloads(manifests)},
    )
    assert work in (roles, roles - {"scoring"} | {"scoring-0", "scoring-1"}, {"gateway"})
    assert {role_of(w) for w, _ in workloads(manifests)} == named["ServiceAccount"] <= roles
    assert named["Service"] == named["PodDisruptionBudget"] == work
    assert {"default-deny", "gateway", *(["workers"] if "reranker" in work else [])} <= named["NetworkPolicy"]
    (namespace,) = (m for m in manifests if m["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_pods_are_restricted(manifests: list[Manifest]) -> None:
    for workload, container in workloads(manifests):
        pod, name = workload["spec"]["template"]["spec"], workload["metadata"]["name"]
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["serviceAccountName"] == role_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert not any("hostPath" in volume for volume in pod["volumes"]), name


def test_pods_start_ready_live_and_stop(manifests: list[Manifest]) -> None:
    for workload, container in workloads(manifests):
        pod, name = workload["spec"]["template"]["spec"], workload["metadata"]["name"]
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe].get("grpc") or container[probe]["httpGet"]
            assert asked["port"] in {*ports, *ports.values()}, f"{name} {probe}"
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}, name
        assert "memory" in container["resources"]["limits"], name
        pause_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain_s = 10.0  # [serving] drain_s_max of double11.toml
        assert pause_s + drain_s < pod["terminationGracePeriodSeconds"], name


def test_services_select_pods_and_their_ports(manifests: list[Manifest]) -> None:
    by_name = {w["metadata"]["name"]: (w, c) for w, c in workloads(manifests)}
    for service in (m for m in manifests if m["kind"] == "Service"):
        workload, container = by_name[service["metadata"]["name"]]
        assert service["spec"]["selector"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= {p["name"] for p in container["ports"]}


def test_configuration_is_read_by_this_release(manifests: list[Manifest], configuration: Config) -> None:
    from recsys.serving.config import ServingConfig

    serving = configuration.get(ServingConfig)
    services = {
        f"dns:///{m['metadata']['name']}:{m['spec']['ports'][0]['port']}" for m in manifests if m["kind"] == "Service"
    }
    scoring = serving.scoring_shards or (serving.scoring_target,)
    targets = {*scoring, serving.rerank_target}
    alone = {w["metadata"]["name"] for w, _ in workloads(manifests)} == {"gateway"}
    assert targets == {""} if alone else targets <= services
    shards = [f"{i}/{len(scoring)}" for i in range(len(scoring))]
    said = [a.removeprefix("--shard=") for _, c in workloads(manifests) for a in c["args"] if a.startswith("--shard=")]
    assert (said or ["0/1"]) == shards


def test_prometheus_reaches_every_process(manifests: list[Manifest], configuration: Config) -> None:
    from llm_reranker.config import RerankConfig
    from recsys.serving.config import ServingConfig, WorkerConfig
    from streaming.config import JobConfig

    gateway, reranker, job = (configuration.get(c) for c in (ServingConfig, RerankConfig, JobConfig))
    assert gateway.metrics_host == reranker.metrics_host == job.metrics_host == "0.0.0.0"
    scoring = configuration.get(WorkerConfig)  # on the host of [serving]
    ports = {"gateway": gateway.metrics_port, "scoring": scoring.metrics_port}
    ports |= {"reranker": reranker.metrics_port, "consumer": job.metrics_port}
    (policy,) = (m["spec"] for m in manifests if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == "metrics")
    ((open_to,),) = (rule["ports"] for rule in policy["ingress"])
    assert all(open_to["port"] <= port <= open_to.get("endPort", open_to["port"]) for port in ports.values())
    (roles,) = (e["values"] for e in policy["podSelector"]["matchExpressions"])
    found = list(workloads(manifests))
    for workload, container in found:
        assert role_of(workload) in roles
        assert {"name": "metrics", "containerPort": ports[role_of(workload)]} in container["ports"]
    assert len(found) > 1 or len(set(ports.values())) == len(ports), "one pod, a port for each process"


def test_commands_parse_with_the_values_of_the_environment(manifests: list[Manifest]) -> None:
    for workload, container in workloads(manifests):
        command, rest = resolve(words_of(container, manifests))
        context = command.make_context(workload["metadata"]["name"], rest, resilient_parsing=False)
        assert context.params


def words_of(container: Manifest, manifests: list[Manifest]) -> list[str]:
    environment = environment_of(manifests)
    words = [*container["command"], *container["args"]]
    return [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word) for word in words]


def test_every_path_that_is_named_lies_on_a_volume(manifests: list[Manifest]) -> None:
    configured = list(values_of(tomllib.loads(configuration_of(manifests))))
    for workload, container in workloads(manifests):
        said = [word.partition("=")[2] or word for word in words_of(container, manifests)]
        named = [value.removeprefix("embedded:") for value in (*said, *configured)]
        mounts = [m["mountPath"] for m in container["volumeMounts"]]
        for path in (PurePosixPath(n) for n in named if n.startswith("/")):
            assert any(path.is_relative_to(m) for m in mounts), f"{workload['metadata']['name']} {path}"


def values_of(table: dict[str, Any]) -> Iterator[str]:
    for value in table.values():
        yield from values_of(value) if isinstance(value, dict) else [str(value)]


def test_an_embedded_folder_is_of_one_pod(manifests: list[Manifest]) -> None:
    """LMDB tells processes by their ids, and those of two containers are the same."""
    environment, users = environment_of(manifests), []
    for workload, container in workloads(manifests):
        if any("embedded:" in word for word in words_of(container, manifests)):
            users.append(workload)
            assert workload["spec"]["replicas"] == 1
            assert workload["spec"]["strategy"] == {"type": "Recreate"}
            assert resolve(words_of(container, manifests))[0].name == "serve"
            assert "--no-writer" not in container["args"]
    assert len(users) == ("embedded:" in environment["STORE_URL"])


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The click command behind a container's words, and what is left for it to parse."""
    match words:
        case ["double11", name, *rest]:
            command = cli.get_command(click.Context(cli), name)
        case ["python", "-m", module, *rest]:
            command = importlib.import_module(module).main
        case _:
            raise AssertionError(f"unknown program: {words}")
    assert isinstance(command, click.Command), words
    return command, rest


def test_containerfile_copies_what_is_there_and_pins_what_the_makefile_pins() -> None:
    text = (ROOT / "k8s/Containerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
    torch = re.search(r"^TORCH_VERSION := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    assert f"torch=={torch[1]}" in text
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert all(f"COPY {package} " in text for package in packages)
