"""The small shop of tests/worlds/pipeline_world.py."""

from pipeline_world import shop_fixture

__all__ = ["shop_fixture"]
