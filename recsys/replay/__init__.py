"""Arms compared on a past period, off-policy estimators, and the report.

compare     replay(): checks, folds the past, asks every arm, writes the report whole or not at all
protocol    who is asked when (frozen, online) and the asking itself
figures     every number of report.json from slates and queries; recompute() does it again from the files
peers       arms that are other people's models, fitted on events before the cut
rolling     rolling(): several cuts and seeds, trained at each, pooled into one report
page        report.html, self-contained
gate        --fail-if: a report against a base report
off_policy  IPS, SNIPS and doubly robust estimates from logged propensities
"""

from recsys.replay.compare import replay
from recsys.replay.figures import read_report, recompute
from recsys.replay.gate import check_gates, check_grammar
from recsys.replay.off_policy import Estimate, doubly_robust, ips, snips
from recsys.replay.rolling import Rolling, rolling

__all__ = [
    "Estimate",
    "Rolling",
    "check_gates",
    "check_grammar",
    "doubly_robust",
    "ips",
    "read_report",
    "recompute",
    "replay",
    "rolling",
    "snips",
]
