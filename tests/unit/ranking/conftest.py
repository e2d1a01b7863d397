"""Fixtures of tests/worlds/pipeline_world.py."""

from pipeline_world import run_fixture, shop_fixture, store_fixture

__all__ = ["run_fixture", "shop_fixture", "store_fixture"]
