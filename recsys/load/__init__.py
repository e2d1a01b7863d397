"""Open-loop load: arrivals drawn before the start, latency counted from the intended send time, one JSON report."""

from recsys.load.arrivals import SHAPES, arrivals
from recsys.load.generator import LoadPlan, run

__all__ = ["SHAPES", "LoadPlan", "arrivals", "run"]
