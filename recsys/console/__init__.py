"""A read-only web page for operators: state, tiers and parts of a gateway, and the latest replay report."""

from recsys.console.page import render
from recsys.console.server import Console

__all__ = ["Console", "render"]
