"""The benchmarks by name. A subject's module has `bench(...) -> (config, rows)` and says what is compared."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.bench.harness import document
from recsys.core import BadInput

SUBJECTS = ("retrieval", "rerank", "features", "ingest", "train", "serve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What `serve` starts: a run, the store with its users' events, and whom to ask for."""

    run: Path
    store: str
    users: Sequence[str]


def run(
    name: str,
    *,
    quick: bool = False,
    deployment: Deployment | None = None,
    events: int | None = None,
    run_path: Path | None = None,
) -> dict[str, Any]:
    """Run one benchmark and return its document. quick: small sizes, for a test of the benchmark itself. events: of
    `ingest`, instead of 10 million. run_path: the run whose tower's item vectors `retrieval` takes, and whose reranker
    `rerank` serves.

    Raises: BadInput for an unknown name, or `serve` without a deployment; Unavailable when a peer is not installed.
    """
    if name not in SUBJECTS:
        raise BadInput("benchmark", came=name, expected=f"one of {', '.join(SUBJECTS)}", fix="Choose one of them.")
    module = importlib.import_module(f"recsys.bench.{name}")
    if name == "ingest":
        return document(name, *module.bench(quick, events))
    if name in ("retrieval", "rerank"):
        return document(name, *module.bench(quick, run_path))
    if name != "serve":
        return document(name, *module.bench(quick))
    if deployment is None or not deployment.users:
        raise BadInput(
            "bench serve",
            came="no --run and --users",
            expected="a run directory and a file with one user id a line",
            fix="Make them: make demo leaves a run in demo-out/run.",
        )
    return document(name, *module.bench(quick, deployment.run, deployment.store, deployment.users))
