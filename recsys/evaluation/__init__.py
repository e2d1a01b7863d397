"""Time cut, queries, relevant sets, ranking measures, bootstrap. NumPy and Polars only.

Everything that reports quality (replay, training's validation, benchmarks) takes its figures from here, so that one
word has one meaning.
"""

from recsys.evaluation.bootstrap import Interval, PairedResult, bootstrap_mean_ci, holm, paired_bootstrap
from recsys.evaluation.measures import MEASURES, coverage, measures
from recsys.evaluation.queries import make_online_queries, make_queries, parse_positives, rare_only, with_rare

__all__ = [
    "MEASURES",
    "Interval",
    "PairedResult",
    "bootstrap_mean_ci",
    "coverage",
    "holm",
    "make_online_queries",
    "make_queries",
    "measures",
    "paired_bootstrap",
    "parse_positives",
    "rare_only",
    "with_rare",
]
