"""Benchmarks: ours, a peer and the machine's limit, measured in one run, interleaved. One file per subject.

Light names only; a subject's module is imported in `run`.
"""

from recsys.bench.harness import Contest, Row, document
from recsys.bench.subjects import SUBJECTS, Deployment, run

__all__ = ["SUBJECTS", "Contest", "Deployment", "Row", "document", "run"]
