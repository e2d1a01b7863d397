"""Fixtures of tests/worlds/serving_world.py."""

from serving_world import dataset, home, live_home, run, serve, shoppers, store

__all__ = ["dataset", "home", "live_home", "run", "serve", "shoppers", "store"]
