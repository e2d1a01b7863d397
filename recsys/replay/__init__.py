"""Arms compared on a past period, off-policy estimators, and the report.

compare     replay(): checks, folds the past, asks every arm, writes the report whole or not at all
protocol    who is asked when (frozen, online) and the asking itself
figures     every number of report.json from slates and queries; recompute() does it again from the files
page        report.html, self-contained
gate        --fail-if: a report against a base report
off_policy  IPS, SNIPS and doubly robust estimates from logged propensities
"""

from recsys.replay.compare import replay
from recsys.replay.figures import read_report, recompute
from recsys.replay.gate import check_gates, check_grammar
from recsys.replay.off_policy import Estimate, doubly_robust, ips, snips

__all__ = [
    "Estimate",
    "check_gates",
    "check_grammar",
    "doubly_robust",
    "ips",
    "read_report",
    "recompute",
    "replay",
    "snips",
]
