"""Scalers own how many pods there are: an overlay that is applied again, as every rollout does, leaves it alone."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from recsys.planning import CapacityPlan, RolePlan, manifests

K8S = Path(__file__).resolve().parents[3] / "k8s"
Kubectl = Callable[..., subprocess.CompletedProcess[str]]
NAMESPACE, DEPLOYMENTS = "scaled", {"gateway", "scoring-0", "scoring-1", "reranker"}


@pytest.fixture
def apply(kubectl: Kubectl, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Apply an overlay of the sharded one with these components."""

    def run(*components: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        document = {
            "namespace": NAMESPACE,
            "resources": [os.path.relpath(K8S / "overlays/sharded", tmp_path)],
            "components": [os.path.relpath(K8S / "components" / c, tmp_path) for c in components],
        }
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(document))
        return kubectl("apply", "--server-side", "-k", str(tmp_path), check=check)

    return run


def test_applying_again_leaves_what_the_scalers_said(kubectl: Kubectl, apply: Callable[..., object]) -> None:
    def replicas() -> dict[str, int]:
        found = json.loads(kubectl("-n", NAMESPACE, "get", "deployments", "-o", "json").stdout)["items"]
        return {d["metadata"]["name"]: d["spec"]["replicas"] for d in found}

    apply()
    assert replicas() == dict.fromkeys(DEPLOYMENTS, 3)
    roles = {
        r: RolePlan(replicas_measured=1, answers_per_s=1.0, replicas=8) for r in ("gateway", "scoring", "reranker")
    }
    plan = CapacityPlan(peak_per_s=8.0, headroom=0.3, in_flight_p50=1, in_flight_p99=1, roles=roles, caveats=())
    scalers = manifests(plan, quiet_per_s=1.0, schedule=None, shards=2, namespace=NAMESPACE)
    kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(scalers))
    assert {s["spec"]["scaleTargetRef"]["name"] for s in scalers} == DEPLOYMENTS
    # As the HorizontalPodAutoscaler's controller does, by the scale subresource.
    kubectl("-n", NAMESPACE, "scale", "--replicas=9", *(f"deployment/{d}" for d in DEPLOYMENTS))
    for _ in range(2):
        apply("scaled")
        assert replicas() == dict.fromkeys(DEPLOYMENTS, 9)
    assert "conflict" in apply(check=False).stderr, "of the number that the overlay alone would say"
