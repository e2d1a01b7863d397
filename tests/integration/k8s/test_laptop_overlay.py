"""The laptop overlay against a real API server: admitted, scheduled, rolled out; a pod that breaks the rules is not."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
Kubectl = Callable[..., subprocess.CompletedProcess[str]]


# What the default storage class of a cluster on a laptop makes for a claim.
VOLUME = {
    "apiVersion": "v1",
    "kind": "PersistentVolume",
    "metadata": {"name": "made-for-state"},
    "spec": {
        "accessModes": ["ReadWriteOnce"],
        "capacity": {"storage": "20Gi"},
        "claimRef": {"namespace": "double11", "name": "state"},
        "hostPath": {"path": "/var/made-for-state"},
    },
}


@pytest.fixture(scope="module")
def applied(kubectl: Kubectl) -> subprocess.CompletedProcess[str]:
    kubectl("apply", "-f", "-", stdin=json.dumps(VOLUME))
    return kubectl("apply", "--server-side", "-k", str(ROOT / "k8s/overlays/laptop"))


def test_the_rollout_completes(kubectl: Kubectl, applied: subprocess.CompletedProcess[str]) -> None:
    assert "deployment.apps/gateway serverside-applied" in applied.stdout
    kubectl("-n", "double11", "rollout", "status", "deployment/gateway", "--timeout=60s")
    pods = json.loads(kubectl("-n", "double11", "get", "pods", "-o", "json").stdout)["items"]
    assert len(pods) == 1, "one container holds all that have the embedded folder open"
    claims = json.loads(kubectl("-n", "double11", "get", "pvc", "-o", "json").stdout)["items"]
    assert {c["metadata"]["name"]: c["status"]["phase"] for c in claims} == {"runs": "Bound", "state": "Bound"}


def test_applying_again_changes_nothing(kubectl: Kubectl, applied: object) -> None:
    done = kubectl("diff", "--server-side", "-k", str(ROOT / "k8s/overlays/laptop"), check=False)
    assert done.returncode == 0, done.stdout


def test_nothing_was_warned_about(applied: subprocess.CompletedProcess[str]) -> None:
    assert applied.stderr == ""


def test_pod_security_refuses_a_pod_that_may_be_root(kubectl: Kubectl, applied: object) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "bad"},
        "spec": {"containers": [{"name": "bad", "image": "double11"}]},
    }
    done = kubectl("-n", "double11", "apply", "-f", "-", check=False, stdin=json.dumps(pod))
    assert done.returncode != 0
    assert 'violates PodSecurity "restricted:latest"' in done.stderr


def test_a_disruption_budget_allows_one_eviction_at_a_time(kubectl: Kubectl, applied: object) -> None:
    kubectl("-n", "double11", "wait", "--for=jsonpath={.status.disruptionsAllowed}=1", "pdb/gateway", "--timeout=30s")
